"""The commands of kdpipe: one module per stage, and the command line that runs them."""
