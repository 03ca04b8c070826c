"""What is to be learnt: how source columns become rows and labels, the label loss, the metrics."""
