"""A description of what cannot be is refused, with the field and the value; every field says what it means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from scipy.stats import beta, loguniform, uniform

from scansteer.core.errors import InputError
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Parameter, Scan, from_yaml, to_yaml

Description = dict[str, Any]


def swap(described: Description) -> None:
    """The rate first, the fraction second."""
    described["parameters"] = dict(reversed(described["parameters"].items()))


def set_at(path: str, value: object) -> Callable[[Description], None]:
    def change(described: Description) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = described
        for part in parents:
            place = place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_at("auxiliaries/t1_s", {"lower": -1, "upper": 3}), "t1_s must be positive, got a range from -1"),
        (set_at("auxiliaries/t2_s", {"lower": 0, "upper": 3}), "t2_s must be positive, got a range from 0"),
        (set_at("auxiliaries/b1_relative", {"lower": -0.5, "upper": 2}), "b1_relative must be positive, got a range from -0.5"),
        (set_at("pools/0/f", -0.1), "must lie within 0 .. 1 of the water protons, got -0.1"),
        (set_at("pools/0/k_per_s", -5.0), "k_per_s of pool .* must not be negative, got -5"),
        (set_at("pools/0/t2_s", {"lower": 0.0, "upper": 0.1}), "t2_s of pool .* must be positive, got a range from 0"),
        (set_at("pools/0/name", ""), "at least 1 character"),
        (lambda described: described["pools"].append(copy.deepcopy(described["pools"][0])), "occurs twice; give every pool a name"),
        (set_at("parameters/fs/upper", 5.0), "a volume fraction is at most 1, got a box up to 5"),
        (set_at("readout/encoded_shot", 9), "must be less than n_shots = 1, got 9"),
        (set_at("matrix", [20, 0, 1]), "matrix"),
        (set_at("pools/0/t2_s", "long"), r"field 'pools\.0\.t2_s': Input should be a valid number"),
        (set_at("pools/0/t2_s", {"lower": 3, "upper": 2}), r"field 'pools\.0\.t2_s': lower \(3\) must not exceed upper \(2\)"),
        (set_at("readout/carry_over", {"lower": 0.1}), r"field 'readout\.carry_over\.upper' is missing"),
        (set_at("auxiliaries/fss", {"lower": -0.1, "upper": 0.1}), "fss must not be negative, got a range from -0.1"),
        (set_at("limits/t_rec_s/lower", -1.0), r"field 'limits\.t_rec_s': a time must not be negative, got a range from -1 s"),
        (set_at("readout/flip_deg", -10.0), r"field 'readout\.flip_deg': .* \(got -10\.0\)"),
        (set_at("first_state", {"mz": {"lower": 0.5, "upper": 5.0}}), "mz must lie within -1 .. 1 of equilibrium, got 0.5 .. 5"),
        (swap, "uses 'fs' as f; the fraction is listed first, the rate second"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(change, said):
    described = PUBLISHED.model_dump(mode="json", exclude_none=True)
    change(described)
    with pytest.raises(InputError, match=said) as refused:
        from_yaml(yaml.safe_dump(described, sort_keys=False), "mine.yaml")
    assert str(refused.value).startswith("mine.yaml: ")
    assert "schema_version" not in str(refused.value)  # not the whole description once more


def test_a_key_that_is_given_twice_is_refused():
    text = to_yaml(PUBLISHED)
    with pytest.raises(InputError, match=rf"^scan: key 'name' is given twice, again in line {text.count(chr(10)) + 1}; keep one\.$"):
        from_yaml(text + "name: other\n")


def test_an_anchor_may_be_merged_and_one_of_its_keys_given_anew():
    first = PUBLISHED.schedule[0].model_dump(mode="json")
    text = yaml.safe_dump(PUBLISHED.model_dump(mode="json", exclude_none=True, exclude={"schedule"}), sort_keys=False)
    rows = f"schedule:\n- &first {first}\n- <<: *first\n  b1_ut: 1.25\n".replace("'", "")
    scan = from_yaml(text + rows)
    assert scan.schedule[1] == scan.schedule[0].model_copy(update={"b1_ut": 1.25})


def test_every_field_of_the_schema_says_what_it_means():
    schema = Scan.model_json_schema()
    models = {"Scan": schema, **schema["$defs"]}
    assert not [f"{model}.{name}" for model, each in models.items() for name, field in each["properties"].items() if not field.get("description")]


@pytest.mark.parametrize(("shape", "draw"), [("uniform", uniform(2.0, 6.0)), ("log-uniform", loguniform(2.0, 8.0)), ("beta", beta(2, 2, 2.0, 6.0))])
def test_the_standard_deviation_of_a_prior(shape, draw):
    assert Parameter(lower=2.0, upper=8.0, prior=shape).prior_sd == pytest.approx(draw.std())
