"""docs/results/weights_by_label.py: which labels get the weight."""

import importlib
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "results"
FILES = {
    "finetune/t/weights.csv": "image_id,epoch,weight,trust,is_flipped\n"
    "01,1,9,,0\n01,2,2,,0\n02,2,0.5,,1\n03,2,1.5,,0\n04,2,,,0\n",
    "finetune/short/weights.csv": "image_id,epoch,weight,trust,is_flipped\n01,1,1,,0\n",
    "finetune/plain/weights.csv": "image_id,epoch,weight,trust,is_flipped\n",
    "noise/n/labels.csv": "image_id,true_label,noisy_label,is_flipped\n01,1,1,0\n02,0,1,1\n03,0,0,0\n04,0,0,0\n",
    "split/s/split.json": json.dumps({"classes": ["NV", "MEL"]}),
    "e/config.json": json.dumps({"inputs": {"runs": "results/runs/e/runs.json"}}),
}


def test_mean_weights_by_label_at_the_last_epoch(tmp_path, monkeypatch, capsys):
    keys = {"split": "s", "noise": "n"}
    names = {"clamp[epochs=2]": "t", "clamp[epochs=1]": "short", "plain": "plain"}
    runs = [{"row": "a", "run": name, "keys": {**keys, "finetune": key}} for name, key in names.items()]
    for name, text in {**FILES, "runs/e/runs.json": json.dumps({"runs": runs})}.items():
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module("weights_by_label").main("e")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| clamp[epochs=2] | NV | 1 | 0 | 1.500 |",
        "| clamp[epochs=2] | MEL | 2 | 1 | 1.250 |",
        "| clamp[epochs=1] | MEL | 1 | 0 | 1.000 |",
    ]
