"""Stage split, from the command line."""

import json

import pandas as pd
import pytest

from medmask import cli

MANIFEST = """image_id,path,label,class_name,group,split_hint,sha256,width,height,phash
one,one.png,0,NA,p1,train,aa,8,8,0000000000000000
two,two.png,1,B,,train,bb,8,8,0000000000000000
three,three.png,0,NA,p1,test,cc,8,8,0000000000000000
four,four.png,1,B,007,test,dd,8,8,0000000000000000
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "manifest.csv").write_text(MANIFEST)
    facts = {"classes": ["NA", "B", "C"], "n": 4, "lists": {"train": 2, "test": 2}, "orders": {"train": [1, 0]}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))

    def run(**config) -> int:
        files = {
            "manifest": "manifest.csv",
            "dataset": "dataset.json",
            "split": "out/split.csv",
            "summary": "out/split.json",
        }
        flags = [text for flag, name in files.items() for text in (f"--{flag}", str(tmp_path / name))]
        return cli.main(["split", "--config", json.dumps(config), *flags])

    return run


def test_published_lists(run, tmp_path):
    assert run(kind="lists", mode="as_published") == 0
    assert (tmp_path / "out/split.csv").read_text() == (
        "image_id,position,label,class_name,group,sha256,side,test_set\n"
        "two,1,1,B,image:two,bb,train,\n"
        "one,0,0,NA,p1,aa,train,\n"
        "three,2,0,NA,p1,cc,test,test\n"
        "four,3,1,B,007,dd,test,test\n"
    )
    summary = json.loads((tmp_path / "out/split.json").read_text())
    assert summary["classes"] == ["NA", "B", "C"]
    assert summary["sides"]["test"] == {"n": 2, "groups": 2, "classes": {"NA": 1, "B": 1, "C": 0}}
    assert summary["crossing"] == {"groups": 1, "images": 1, "kept": True, "dropped": 0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"split.csv", "split.json", "config.json"}


def test_corrected_lists_drop_and_say_so(run, tmp_path, capsys):
    assert run(kind="lists") == 0
    assert pd.read_csv(tmp_path / "out/split.csv")["image_id"].tolist() == ["two", "three", "four"]
    notes = json.loads((tmp_path / "out/split.json").read_text())["notes"]
    assert notes[0].startswith(
        "1 training or validation images show 1 groups (patients, lesions) of the test set (1 of 2"
    )
    assert notes[0] in capsys.readouterr().err


def test_mistakes_leave_nothing(run, tmp_path, capsys):
    assert run(kind="stratified", sizes={"train": 4, "test": 1}) == 2
    assert "the dataset has 4" in capsys.readouterr().err
    assert run(kind="lists", crossing="refuse") == 2
    assert "one" in capsys.readouterr().err
    for text, message in (
        (MANIFEST[: MANIFEST.index("four")], "manifest.csv: 3 rows, but"),
        (MANIFEST[:-30], "manifest.csv: cut: its last line has no end"),
    ):
        (tmp_path / "manifest.csv").write_text(text)
        assert run(kind="lists") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "manifest.csv").write_text("image_id\none\n")
    assert run(kind="lists") == 2
    assert "manifest.csv: missing column label" in capsys.readouterr().err
    (tmp_path / "manifest.csv").write_text(MANIFEST)
    for text, message in (
        ("[1, 2]", "need an object with the keys classes, n, lists, orders, got a list"),
        ('{"classes": "ab"}', "classes: need list, got str\n  n: need int, got NoneType"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        assert run(kind="lists") == 2
        assert message in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
