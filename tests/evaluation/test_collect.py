"""What is read of a run, finished or not."""

from medmask.evaluation.collect import Run, first_missing
from tests.evaluation.fake_results import write_json


def test_maps_that_failed_are_named_with_their_error(tmp_path):
    results = tmp_path / "results"
    (results / "pretrain/p-1").mkdir(parents=True)
    (results / "pretrain/p-1/record.json").write_text("{}")
    (tmp_path / "logs/mask").mkdir(parents=True)
    (tmp_path / "logs/mask/m-1.log").write_text("medmask mask: error: mask.layer: no layer 'x'\n")
    keys = {"pretrain": "p-1", "mask": "m-1", "finetune": "f-1", "evaluate": "e-1"}
    reason = first_missing(Run({"keys": keys}, results))
    assert reason == "mask: medmask mask: error: mask.layer: no layer 'x'"


def test_trainings_that_judged_labels_count_for_the_run(tmp_path):
    keys = {"pretrain": "p", "audit": "a", "finetune": "own"}
    for key, seconds in (("one", 1.0), ("two", 2.0), ("own", 4.0)):
        write_json(tmp_path / "finetune" / key / "record.json", {"seconds": seconds, "epochs": 3})
    networks = [f"results/finetune/{key}/model.safetensors" for key in ("one", "two", "gone")]
    write_json(tmp_path / "audit" / "a" / "config.json", {"inputs": {"networks": networks}})
    run = Run({"keys": keys, "settings": {}}, tmp_path)
    assert [record["seconds"] for record in run.records()] == [1.0, 2.0, 4.0]
    assert Run({"keys": {"finetune": "own"}, "settings": {}}, tmp_path).records() == run.records()[-1:]
