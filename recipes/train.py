"""accelerate launch --config_file accelerate_configs/single.yaml recipes/train.py recipes/sorting_lm.yaml [--field value]"""

from grpo_hf.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
