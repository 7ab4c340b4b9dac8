"""What is said of a run that has not finished."""

from medmask.evaluation.collect import Run, first_missing


def test_maps_that_failed_are_named_with_their_error(tmp_path):
    results = tmp_path / "results"
    (results / "pretrain/p-1").mkdir(parents=True)
    (results / "pretrain/p-1/record.json").write_text("{}")
    (tmp_path / "logs/mask").mkdir(parents=True)
    (tmp_path / "logs/mask/m-1.log").write_text("medmask mask: error: mask.layer: no layer 'x'\n")
    keys = {"pretrain": "p-1", "mask": "m-1", "finetune": "f-1", "evaluate": "e-1"}
    reason = first_missing(Run({"keys": keys}, results))
    assert reason == "mask: medmask mask: error: mask.layer: no layer 'x'"
