"""`python -m kdpipe_stages …` is `kdpipe …`; so `torchrun -m kdpipe_stages train-student` works."""

from kdpipe_stages.cli import main

main()
