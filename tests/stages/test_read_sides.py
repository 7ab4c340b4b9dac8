"""The rows that a training reads: split, labels and pack must belong together."""

import json
from pathlib import Path

import pytest

from medmask.errors import DataError
from medmask.stages.sides import read_sides
from medmask.stages.training import Files
from tests.toy import settings, write_data


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("labels", "i3,1,1,0\n", "i3,1,1,0\ni3,1,1,0\n", "labels.csv: 1 problem:\n  image i3 stands twice"),
        ("labels", "i3,", "x3,", "2 problems:\n  image x3 is not in {split}\n  no label for image i3"),
        ("labels", "i3,1,1,0", "i3,0,0,0", "image i3: true_label is not the label in {split}"),
        ("split", "i3,3,", "i3,12,", "split.csv: 1 problem:\n  image i3: position is not in 0..11"),
        ("split", "i3,3,", "i3,-1,", "split.csv: 1 problem:\n  image i3: position is not in 0..11"),
        ("summary", '"n": 9', '"n": 10', "split.csv: 9 rows on the side train, but {summary} counts 10"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, name, old, new, message):
    data = write_data(tmp_path, n=12, n_val=3)
    counts = {side: {"n": n} for side, n in (("train", 9), ("val", 3), ("test", 0))}
    data["summary"].write_text(json.dumps({"classes": ["c0", "c1"], "sides": counts}))
    outputs = {name: tmp_path / name for name in ("model", "best", "history", "record")}
    files = Files(**data, init=None, teacher=None, **outputs)
    assert [len(rows) for rows in read_sides(settings(), files)[0].values()] == [9, 3, 0]
    text = data[name].read_text()
    assert old in text
    Path(data[name]).write_text(text.replace(old, new))
    with pytest.raises(DataError) as caught:
        read_sides(settings(), files)
    assert message.format(**data) in str(caught.value)
