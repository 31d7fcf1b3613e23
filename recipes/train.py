"""accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py recipes/sorting_lm.yaml [--field value]"""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from grpo_hf.cli import main

if __name__ == "__main__":
    raise SystemExit(record(main)(["train", *sys.argv[1:]]))  # the launcher shows the traceback of a process that fails
