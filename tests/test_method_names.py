"""Methods by name: options in text, faults that say what is right, methods of other packages, the table."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

import numpy as np
import pytest

from edge_tokcomp.errors import TokcompError, UsageError
from edge_tokcomp.methods import METHODS, Method, Picks, get_method, method_table


@dataclass(frozen=True)
class Custom(Method):
    """A method of another package."""

    name: ClassVar[str] = "fine"
    title: ClassVar[str] = "Fine"
    source: ClassVar[str] = "test"

    def choose(self, rows, k):
        return Picks(np.arange(k))


def test_names_carry_options_and_print_them_back():
    method = get_method("prunesid:centre=token, score=projection,lambda=2.5,keep_cls=true,groups=none")
    assert (method.centre, method.score, method.lambda_) == ("token", "projection", 2.5)
    assert (method.keep_cls, method.groups) == (True, None)
    assert get_method(str(method)) == method
    for name in METHODS:
        assert str(get_method(name)) == name
        assert get_method(name).name == name
    assert get_method("prunesid:groups=3", groups=5, lambda_=1.0).groups == 5
    assert get_method(method, centre="feature").centre == "feature"
    assert get_method(method) == method


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("prunsid", r"unknown method 'prunsid' \(did you mean 'prunesid'\?\); methods: none, random,"),
        ("", "unknown method ''"),
        ("todre:shape=x", "method todre has no option 'shape'; its options: form, block"),
        (
            "prunesid:center=token",
            r"no option 'center' \(did you mean 'centre'\?\); its options: centre, .*lambda.*, block",
        ),
        ("none:x=1", "its options: none"),
        ("todre:form", "'form' is not NAME=VALUE"),
        ("todre:", "is not NAME=VALUE"),
        ("todre:form=max_sum,form=k_center", "stands twice"),
        ("todre:form=best", "todre: form must be max_sum or k_center, got 'best'"),
        ("prunesid:groups=1.5", "prunesid: groups must be a whole number or none, got 1.5"),
        ("prunesid:groups=0", "groups must be 1 or more, got 0"),
        ("prunesid:upper_mult=-1", "upper_mult must be 1 or more"),
        ("prunesid:lambda=0", "lambda must be above 0"),
        ("prunesid:lambda=nan", "lambda must be a number or none, got nan"),
        ("prunesid:lambda=true", "lambda must be a number or none, got True"),
        ("prunesid:keep_cls=1", "keep_cls must be true or false, got 1"),
        ("prunesid:upper_mult=true", "upper_mult must be a whole number, got True"),
    ],
)
def test_wrong_names_and_options_say_what_is_right(written, says):
    with pytest.raises(UsageError, match=says):
        get_method(written)


def test_unknown_keyword_options_are_refused_for_names_and_instances():
    for method in ("todre", get_method("todre")):
        with pytest.raises(UsageError, match="no option 'k'"):
            get_method(method, k=3)


def test_methods_of_other_packages_are_found_by_entry_point_only_when_asked_for(monkeypatch):
    module = types.ModuleType("outside_methods")
    module.Custom, module.number = Custom, 3
    monkeypatch.setitem(sys.modules, "outside_methods", module)
    points = {"fine": "outside_methods:Custom", "broken": "no_such_module:X", "wrong": "outside_methods:number"}

    def entry_points(*, group):
        assert group == "edge_tokcomp.methods"
        return [metadata.EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert isinstance(get_method("fine"), Custom)
    with pytest.raises(TokcompError, match=r"'broken' \(no_such_module:X\) cannot be loaded"):
        get_method("broken")
    with pytest.raises(TokcompError, match=r"'wrong'.*not a subclass"):
        get_method("wrong")
    with pytest.raises(UsageError, match=r"methods: none, .*todre, .*, broken, fine, wrong"):
        get_method("nothing")
    points.pop("broken"), points.pop("wrong")
    assert [row["name"] for row in method_table()] == [*METHODS, "fine"]


def test_the_table_lists_every_method_with_inputs_and_defaults_as_json():
    table = {row["name"]: row for row in json.loads(json.dumps(method_table()))}
    assert list(table)[: len(METHODS)] == list(METHODS)
    assert table["prunesid"]["needs"] == ["cls_attention"]
    assert table["prunesid-paper"]["needs"] == []
    assert table["prunesid"]["options"]["lambda"] == {"default": None, "accepts": "a number or none"}
    assert table["todre"]["options"] == {
        "form": {"default": "max_sum", "accepts": "max_sum or k_center"},
        "block": {"default": None, "accepts": "a whole number or none"},
    }
    assert table["todre"]["wants"] == ["cls_attention"]
    for name, cls in METHODS.items():
        assert cls.name == name
        assert cls.title
        assert cls.source


def test_importing_the_methods_imports_neither_torch_nor_plugins():
    code = (
        "import importlib.metadata as m, sys; m.entry_points = None; import edge_tokcomp.methods as t; "
        "t.get_method('todre'); print(sorted({'torch', 'onnxruntime', 'llama_cpp'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
