"""`python -m grpo_hf`, and `accelerate launch -m grpo_hf train RECIPE`, are `grpo-hf`."""

from torch.distributed.elastic.multiprocessing.errors import record

from grpo_hf.cli import main

raise SystemExit(record(main)())  # the launcher shows the traceback of a process that fails
