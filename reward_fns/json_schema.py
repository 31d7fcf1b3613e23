"""Whether the completion is JSON that fits a schema."""

from __future__ import annotations

import json
import re
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from grpo_hf.reward_fns.marks import scoped
from grpo_hf.rewards.outcomes import NO_ANSWER, BadGoldError, parses_gold
from grpo_hf.rewards.registry import register_reward

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_MAX_DEPTH = 50  # what lies deeper would exhaust Python's stack in the validator, and so look like an error of the schema
_MISSING = object()


def checked_schema(schema: Any) -> dict[str, Any] | bool:
    """A JSON Schema, from a mapping or its JSON text.

    Raises:
        BadGoldError: it is neither, or not a schema.
    """
    parsed = parsed_json(schema) if isinstance(schema, str) else schema
    if not isinstance(parsed, dict | bool):
        raise BadGoldError(f"json_schema needs a schema as a mapping or as its JSON text; got {schema!r}")
    try:
        validator_for(parsed, default=Draft202012Validator).check_schema(parsed)
    except SchemaError as error:
        raise BadGoldError(
            f"not a JSON Schema: {error.message} at {error.json_path} of {json.dumps(parsed)[:200]};"
            " in a dataset column keep schemas as JSON text, since tables fill up missing keys with null"
        ) from error
    return parsed


@register_reward
@parses_gold(checked_schema)
@scoped
def json_schema(completion: str, schema: dict[str, Any] | bool, *, formats: bool = True) -> float:
    """1.0 if the completion is JSON that is valid under the schema, else 0.0 (JSON Schema 2020-12, or what `$schema` says).

    The JSON is the whole completion or, where that is none, its last fenced block that is unmarked or marked json. The
    schema is a column or an option, as a mapping or as JSON text. `$ref` reaches inside the schema only, never the network.
    With `formats`, "format": "date" and the others that jsonschema checks are asserted, which the standard leaves open.

    >>> schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    >>> json_schema('{"age": 7}', schema), json_schema('{"age": "7"}', schema), json_schema("seven", schema)
    (1.0, 0.0, 0.0)
    >>> json_schema('Here:\\n```json\\n{"age": 7}\\n```', '{"required": ["age"]}')
    1.0

    Raises:
        BadGoldError: the schema is not a schema, or refers to what it does not hold.
    """
    value = json_of(completion)
    if value is _MISSING:
        return NO_ANSWER
    if _too_deep(value):
        return 0.0
    validator = validator_for(schema, default=Draft202012Validator)
    checker = validator.FORMAT_CHECKER if formats else None
    try:
        return float(validator(schema, registry=Registry(), format_checker=checker).is_valid(value))
    except Unresolvable as error:
        raise BadGoldError(f"the schema refers to {error.ref!r}, which it does not hold") from error


def json_of(completion: str) -> Any:
    """The JSON value of a completion, or of its last fenced block; `_MISSING` if there is none."""
    whole = parsed_json(completion)
    if whole is not _MISSING:
        return whole
    fences = list(_FENCE.finditer(completion))
    for start, end in list(zip(fences[::2], fences[1::2], strict=False))[::-1]:
        if start[1].lower() in ("", "json"):
            return parsed_json(completion[start.end() : end.start()])
    return _MISSING


def parsed_json(text: str) -> Any:
    """The value of a JSON text; `_MISSING` if it is not JSON (NaN and Infinity are not), or nested too deep to read."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING


def _refuse(constant: str) -> Any:
    """Python reads NaN and Infinity; JSON has neither."""
    raise ValueError(constant)


def _too_deep(value: Any) -> bool:
    """Say whether lists and objects are nested deeper than `_MAX_DEPTH`."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
