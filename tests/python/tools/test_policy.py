"""``funicular.Policy``: the file's schema as frozen types."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_type_hints

import pytest

import funicular
from funicular import _core, policy
from funicular.policy import Budget, Nvme, Optimizer, Override, Policy, Units


def test_the_types_are_the_schema() -> None:
    """The same sections, keys, words and defaults."""
    schema: dict[str, Any] = json.loads(_core.policy_schema())["properties"]
    hints = get_type_hints(Policy)
    assert set(schema) == set(hints)
    for section, of in schema.items():
        if section == "override":
            assert set(of["items"]["properties"]) == {f.name for f in dataclasses.fields(Override)}
        elif "properties" in of:
            kind = hints[section]
            types = get_type_hints(kind)
            assert set(of["properties"]) == set(types), section
            made = dataclasses.asdict(kind())
            for key, value in of["properties"].items():
                default = made[key]
                assert (list(default) if isinstance(default, tuple) else default) == value["default"], (section, key)
                if "enum" in value:
                    assert list(get_args(types[key])) == value["enum"], (section, key)


def test_policies_are_values() -> None:
    one = Policy(budget=Budget(hbm="12 GiB"), optimizer=Optimizer(tier="nvme"), nvme=Nvme(paths=("/mnt/a",)))
    same = Policy.from_mapping(
        {"budget": {"hbm": "12288MiB"}, "optimizer": {"tier": "nvme"}, "nvme": {"paths": ["/mnt/a"]}}
    )
    assert one.budget.hbm == "12GiB", "in the core's spelling"
    assert one == same
    assert hash(one) == hash(same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.budget.hbm = "1GiB"  # type: ignore[misc]
    assert Policy.from_mapping(one.to_dict()) == one
    assert json.loads(one.to_json())["version"] == 1
    assert one.replace(budget__hbm="1GiB").budget == Budget(hbm="1GiB")
    assert one.budget.hbm == "12GiB", "replace leaves the policy alone"


def _nested(levels: int) -> dict[str, Any]:
    policy: dict[str, Any] = {}
    for _ in range(levels):
        policy = {"a": policy}
    return policy


@pytest.mark.parametrize(
    ("make", "code", "part"),
    [
        (lambda: Policy(budget=Budget(hbm="12")), "FN-E503", "12GiB"),
        (lambda: Policy(optimizer=Optimizer(tier="disk")), "FN-E503", "'disk'"),  # type: ignore[arg-type]
        (lambda: Policy(units=Units(match=("[",))), "FN-E503", "units.match"),
        (lambda: Policy(optimizer=Optimizer(tier="nvme")), "FN-E503", "nvme.paths"),
        (lambda: Policy(override=(Override(match="*"),)), "FN-E503", "sets nothing"),
        (lambda: Policy().replace(budget__hmb="1GiB"), "FN-E502", "'budget.hbm'"),
        (lambda: Policy.preset("hosts"), "FN-E503", "'host'"),
        (lambda: Policy.load({"device": b"host"}), "FN-E503", "b'host' is of type bytes"),
        (lambda: Policy(device=b"host"), "FN-E503", "b'host' is of type bytes"),  # type: ignore[arg-type]
        (lambda: Policy.load({"units": {"match": {"a"}}}), "FN-E503", "{'a'} is of type set"),
        (lambda: Policy.load({("a", "b"): 1}), "FN-E503", "keys must be str"),  # type: ignore[dict-item]
        (lambda: Policy.load(_nested(5000)), "FN-E503", "nested too deep"),
    ],
)
def test_what_is_wrong_is_refused_as_in_a_file(make: Any, code: str, part: str) -> None:
    with pytest.raises(funicular.UsageError) as caught:
        make()
    assert str(caught.value).startswith(code)
    assert part in str(caught.value)


def test_the_environment_is_over_files_and_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNICULAR_BUDGET__HBM", "3GiB")
    assert Policy.preset("host").budget.hbm == "3GiB"
    assert Policy.load({"budget": {"hbm": "1GiB"}}).budget.hbm == "3GiB"
    assert Policy.preset("host", budget__hbm="2GiB").budget.hbm == "2GiB"
    assert Policy(budget=Budget(hbm="1GiB")).budget.hbm == "1GiB", "code says only what it says"


def test_presets() -> None:
    assert Policy.load("host") == Policy.preset("host")
    with pytest.raises(funicular.UsageError, match=r"FN-E504 \./host: .*preset"):
        Policy.load("./host")
    with pytest.raises(funicular.UsageError, match="FN-E504 hots: .*did you mean 'host'"):
        Policy.load("hots")
    with pytest.raises(
        funicular.UsageError, match="FN-E503 a policy cannot be made of int. Give the path of a file, a preset"
    ):
        Policy.load(42)  # type: ignore[arg-type]
    assert Policy.preset("fits") == Policy.load(None)
    assert Policy.preset("host").params.tier == "host"
    laptop = Policy.preset("laptop", nvme__paths="/mnt/a")
    assert (laptop.optimizer.tier, laptop.nvme.paths) == ("nvme", ("/mnt/a",))
    assert set(policy.__all__) >= {"Policy", "Budget"}
