"""The mathematics of GRPO: tensors in, tensors out; imports torch and einops only."""
