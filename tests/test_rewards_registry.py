"""The registry: where verifiers are found, what their signatures say, and what its errors tell the user."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest

from grpo_hf.rewards import check_columns, get_reward, get_rewards, known_rewards, register_reward, registry
from grpo_hf.types import Sample
from tests.scoring import score

SHIPPED = {
    "code": {},
    "cosine_length": {"correct": "exact_match", "max_length": 10},
    "countdown": {},
    "exact_match": {},
    "format": {},
    "gsm8k": {},
    "json_schema": {},
    "math": {},
    "multiple_choice": {},
    "reasoning_gym": {},
    "regex": {},
    "repetition": {},
    "soft_overlong": {"max_length": 10, "cache": 2},
    "sort_distance": {},
    "sort_inclusion_ordering": {},
    "sorting": {},
}
"""Every verifier that ships, with the options that it needs."""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Give each test a registry that it may fill."""
    monkeypatch.setattr(registry, "_registry", {})


def test_five_lines_register_a_verifier():
    @register_reward
    def ends_politely(completion):
        return completion.endswith("please")

    reward = get_reward("ends_politely")
    assert reward.function("more tea please") is True
    assert reward.name == "ends_politely" and "ends_politely" in known_rewards()


def test_a_name_of_its_own():
    @register_reward("polite")
    def ends_politely(completion):
        return 1.0

    assert get_reward("polite").name == "polite"
    assert "ends_politely" not in known_rewards()


def test_a_taken_name_names_both_functions():
    def first(completion): ...
    def second(completion): ...

    register_reward("same")(first)
    with pytest.raises(ValueError, match=r"'same' is taken by .*first; .*second needs another"):
        register_reward("same")(second)


def test_a_reload_replaces_the_function():
    def define(value):
        @register_reward
        def reloaded(completion):
            return value

    define(1.0)
    define(2.0)
    assert get_reward("reloaded").function("") == 2.0


def test_a_name_of_an_entry_point_is_taken_before_it_is_loaded():
    with pytest.raises(ValueError, match=r"taken by grpo_hf\.reward_fns\.gsm8k:gsm8k; .*mine needs another"):

        @register_reward("gsm8k")
        def mine(completion): ...


def test_what_a_per_sample_signature_says():
    def f(completion, answer, prompt, *, unit="kg", log_metric=None): ...

    reward = get_reward(f)
    assert (reward.name, reward.per_sample, reward.takes_all, reward.is_async) == ("f", True, False, False)
    assert (reward.columns, reward.optional_columns) == (("answer",), ("unit",))
    assert reward.built_ins == ("completion", "prompt", "log_metric")
    assert [reward.accepts(name) for name in ("answer", "unit", "prompt", "completion_ids", "other")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_what_a_batch_signature_says():
    async def f(prompts, completions, solution, **kwargs): ...

    reward = get_reward(f)
    assert (reward.per_sample, reward.takes_all, reward.is_async) == (False, True, True)
    assert (reward.columns, reward.optional_columns) == (("solution",), ())
    assert reward.accepts("anything")


def no_completion(text): ...
def two_completions(completion, completions): ...
def by_position(completion, /): ...


def by_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def of_anything(**kwargs):
    return [float(len(text)) for text in kwargs["completions"]]


@pytest.mark.parametrize(("function", "scores"), [(by_length, [2.0, 1.0]), (of_anything, [3.0, 2.0])])
def test_a_batch_form_may_leave_completions_to_its_keywords(function, scores):
    """As TRL's first documented example does."""
    reward = get_reward(function)
    assert not reward.per_sample and reward.takes_state
    samples = [Sample("p", text, text, ids, {"prompt": "p"}) for text, ids in (("abc", [1, 2]), ("de", [3]))]
    assert score(reward, samples) == scores


@pytest.mark.parametrize(
    ("function", "have"), [(no_completion, "neither"), (two_completions, "both"), (by_position, "neither")]
)
def test_a_signature_of_neither_form_shows_both(function, have):
    with pytest.raises(ValueError, match=f"'{function.__name__}' has {have} of .*f\\(completion, .*f\\(completions, "):
        get_reward(function)


def test_a_mix_of_the_forms_names_the_parameter():
    def f(completion, prompts): ...

    with pytest.raises(ValueError, match="nothing fills its parameter 'prompts'"):
        get_reward(f)


def test_callable_objects_and_partials_have_names():
    class Judge:
        async def __call__(self, completion): ...

    def f(completion, answer, scale=1.0):
        return scale

    assert (get_reward(Judge()).name, get_reward(Judge()).is_async) == ("Judge", True)
    reward = get_reward(functools.partial(f, scale=2.0))
    assert (reward.name, reward.columns, reward.optional_columns) == ("f", ("answer",), ())
    assert get_reward(functools.partial(Judge())).is_async


def test_a_reward_is_its_own_spec_and_other_things_are_refused():
    reward = get_reward("exact_match")
    assert get_reward(reward) is reward
    with pytest.raises(ValueError, match="got 3"):
        get_reward(3)


def test_entry_points_ship_the_verifiers_and_load_lazily(monkeypatch):
    monkeypatch.delitem(sys.modules, "grpo_hf.reward_fns.exact_match", raising=False)
    assert set(SHIPPED) <= set(known_rewards())
    assert "grpo_hf.reward_fns.exact_match" not in sys.modules
    assert get_reward("exact_match").function("4", "4") == 1.0
    assert "grpo_hf.reward_fns.exact_match" in sys.modules


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_verifier_is_found_and_called_by_its_name(name):
    reward = get_reward({"name": name, **SHIPPED[name]})
    assert (reward.name, reward.per_sample, reward.is_async) == (name, True, False)
    assert reward.function.__doc__ or SHIPPED[name]


def test_a_folder_reward_fns_beside_a_script_hides_no_shipped_verifier(tmp_path):
    """Neither from the script nor from the workers, which inherit its Python path."""
    (tmp_path / "reward_fns").mkdir()
    for name in ("__init__", "gsm8k", "marks", "code"):
        (tmp_path / "reward_fns" / f"{name}.py").write_text(f"raise ImportError('the user's own {name}')\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"completion": "#### 4", "answer": "#### 4"}) + "\n")
    (tmp_path / "script.py").write_text(
        "from grpo_hf.cli import main\nif __name__ == '__main__':\n    main('verify data.jsonl --reward gsm8k'.split())\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^gsm8k +1 .* 1\.000 ", done.stdout, re.MULTILINE), done.stdout


def install(folder, package, value, body="def shout(completion):\n    return float(completion.isupper())\n"):
    """Lay out a distribution as pip would."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[grpo_hf.rewards]\nshout = {value}\n")
    (folder / f"{package}.py").write_text(body)


def test_another_packages_entry_point(tmp_path, monkeypatch):
    install(tmp_path, "loud_rewards", "loud_rewards:shout")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = get_reward("shout")
    assert (reward.name, reward.function("HEY"), reward.function("hey")) == ("shout", 1.0, 0.0)
    assert "shout" in known_rewards()


def test_two_packages_with_one_name(tmp_path, monkeypatch):
    install(tmp_path, "loud_one", "loud_one:shout")
    install(tmp_path, "loud_two", "loud_two:shout")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"several packages provide a reward 'shout'.*loud_one:shout"):
        get_reward("shout")


def test_module_and_function():
    assert get_reward("grpo_hf.reward_fns.sorting:sort_distance").function("1 2", [2, 1]) == 2.0


def test_file_and_function_loaded_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def half(completion, answer):\n    return 0.5\n")
    reward = get_reward(f"{file}:half")
    assert (reward.name, reward.columns, reward.function("", "")) == ("half", ("answer",), 0.5)
    assert get_reward(f"{file}:half").function is reward.function


def test_a_relative_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def half(completion):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert get_reward("mine.py:half").function("") == 0.5


def test_a_file_that_fails_is_not_kept(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        get_reward(f"{file}:half")
    file.write_text("def half(completion):\n    return 0.5\n")
    assert get_reward(f"{file}:half").function("") == 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/file.py:f", r"there is no file .*no/such/file\.py"),
        ("no_such_package.part:f", "there is no module 'no_such_package'"),
        ("grpo_hf.reward_fns.no_such_part:f", r"there is no module 'grpo_hf\.reward_fns\.no_such_part'"),
        ("grpo_hf.reward_fns.sorting:sort_distanc", r"has no attribute 'sort_distanc' \(nearest: sort_distance\)"),
        ("grpo_hf.reward_fns.sorting:_INTEGER", "is not a function but"),
        ("reward_fns/sorting.py", r"names a file but no function; write reward_fns/sorting\.py:function"),
    ],
)
def test_what_is_missing_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        get_reward(spec)


def test_an_import_that_fails_inside_a_module_propagates(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        get_reward("needs_more:f")


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ValueError, match=r"unknown reward 'exct_match'; known are: (.*) \(nearest: exact_match\)") as e:
        get_reward("exct_match")
    listed = str(e.value).split("known are: ")[1].split(" (")[0].split(", ")
    assert set(SHIPPED) <= set(listed) and listed == sorted(listed)


def test_options_bind_keywords_and_keep_the_name():
    reward = get_reward({"name": "format", "pattern": "[0-9]+"})
    assert (reward.name, reward.optional_columns, reward.bound) == ("format", (), ("pattern",))
    assert (reward.function("42"), reward.function("no")) == (1.0, 0.0)
    assert not reward.accepts("pattern")


def test_an_unknown_option_lists_the_options():
    message = r"no option 'patern'; its options are: pattern \(nearest: pattern\)"
    with pytest.raises(ValueError, match=message):
        get_reward({"name": "format", "patern": "x"})
    with pytest.raises(ValueError, match="no option 'completion'"):
        get_reward({"name": "format", "completion": "x"})
    with pytest.raises(ValueError, match=r"needs the key 'name'; got the keys \['pattern'\]"):
        get_reward({"pattern": "x"})


def test_repeated_names_get_suffixes():
    specs = ["exact_match", {"name": "exact_match", "ignore_case": True}, "format", "exact_match"]
    assert [reward.name for reward in get_rewards(specs)] == ["exact_match", "exact_match_2", "format", "exact_match_3"]


def test_one_spec_alone_is_a_list_of_one():
    assert [reward.name for reward in get_rewards("format")] == ["format"]
    assert [reward.name for reward in get_rewards({"name": "format", "pattern": "x"})] == ["format"]
    assert [reward.name for reward in get_rewards(lambda completion: 1.0)] == ["<lambda>"]


def test_check_columns_names_the_verifier_the_column_and_the_nearest():
    rewards = get_rewards(["format", "exact_match"])
    check_columns(rewards, ["prompt", "answer"])
    with pytest.raises(ValueError) as error:
        check_columns(rewards, ["prompt", "answers"], "evaluation dataset")
    assert str(error.value) == (
        "the verifier 'exact_match' asks for the column 'answer', which the evaluation dataset lacks;"
        " its columns are: prompt, answers (nearest: answers)"
    )
    with pytest.raises(
        ValueError, match=r"lacks; .*: prompt; one value for all rows is an option: \{name: regex, pattern: "
    ):
        check_columns(get_rewards("regex"), ["prompt"])
