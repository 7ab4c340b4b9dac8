"""What runs, what runs again, and what is refused, through the real Snakefile."""

import csv
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medmask import io
from tests.workflow.conftest import ROOT, Workflow, job_stats, tiny

SUMMARY = (
    "experiment,run,dataset,split,noise,pretrain,finetune,seed,test_set,metric,value,ci_low,ci_high,n,n_groups,"
    "selection,published,published_source"
)


@pytest.mark.slow
def test_the_chain_ends_in_tables_figures_and_a_report(finished):
    folder = finished.folder / "results" / "tiny"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    drawn = ("metric", "confusion", "curves", "noise", "weights", "classes")
    figures = {f"figures/{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    tables = {"summary.csv", "table.csv", "table.md", "table.tex", "table.html", "runs.csv", "claim.md"}
    assert names - {"config.json"} == {"report.html"} | figures | tables
    assert (folder / "summary.csv").read_text().splitlines()[0] == SUMMARY
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert len(rows) == 2 * 2 * 2  # runs, metrics, selections
    assert all(0 <= float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"]) <= 1 for row in rows)
    assert "table.html" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_every_artifact_says_what_made_it(finished):
    for config in (finished.folder / "results").glob("*/*/config.json"):
        record = json.loads(config.read_text())
        assert set(record) == {"stage", "medmask", "commit", "config", "inputs"}, config


@pytest.mark.slow
def test_nothing_partial_is_left(finished):
    assert not list((finished.folder / "results").rglob(".*"))
    assert not list((finished.folder / "work").rglob("*.pt"))  # checkpoints go once their results stand


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do(finished):
    assert finished.jobs(tiny()) == {}


def put(path, value):
    def change(raw):
        *parents, last = path.split("/")
        block = raw
        for name in parents:
            block = block[name]
        block[last] = value
        return raw

    return change


def renamed(raw):
    raw["finetunings"]["other"] = raw["finetunings"].pop("plain")
    for row in raw["experiments"]["tiny"]["runs"].values():
        row["finetune"] = "other"
    return raw


def reordered(raw):
    return put("finetunings/plain", dict(reversed(raw["finetunings"]["plain"].items())))(raw)


AGAIN = {
    "a finetuning option": (
        put("finetunings/plain/lr", 0.01),
        {"finetune": 2, "evaluate": 2, "runs": 1, "aggregate": 1},
    ),
    "a pretraining option": (
        put("pretrainings/base/lr", 0.01),
        {"pretrain_ddp": 1, "finetune": 1, "evaluate": 1, "runs": 1, "aggregate": 1},
    ),
    "the noise": (
        put("noises/sym/rate", 0.3),
        {"noise": 1, "pretrain_ddp": 1, "finetune": 2, "evaluate": 2, "runs": 1, "aggregate": 1},
    ),
    "the split": (
        put("splits/holdout/seed", 1),
        {"split": 1, "noise": 1, "pretrain_ddp": 1, "finetune": 2, "evaluate": 2, "runs": 1, "aggregate": 1},
    ),
    "one more seed": (
        put("experiments/tiny/seeds", [0, 1]),
        {"noise": 1, "pretrain_ddp": 1, "finetune": 2, "evaluate": 2, "runs": 1, "aggregate": 1},
    ),
    "a bootstrap setting": (put("evaluations/default/draws", 300), {"evaluate": 2, "runs": 1, "aggregate": 1}),
    "a metric of the table": (put("evaluations/default/metrics", ["f1_macro"]), {"runs": 1, "aggregate": 1}),
    "the shape of the table": (put("experiments/tiny/table", {"decimals": 2}), {"runs": 1, "aggregate": 1}),
    "a renamed block": (renamed, {"runs": 1, "aggregate": 1}),
    "reordered keys": (reordered, {}),
    "reordered rows": (lambda raw: json.loads(json.dumps(raw, sort_keys=True)), {"runs": 1, "aggregate": 1}),
    "a time limit": (put("finetunings/plain/needs", {"gpu": 0, "hours": 5}), {}),
    "another number of ranks": (put("pretrainings/base/ranks", 4), {}),
    "one process instead of two ranks": (put("pretrainings/base/ranks", 1), {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_a_change_runs_only_what_depends_on_it(finished, name):
    change, expected = AGAIN[name]
    assert finished.jobs(change(tiny())) == expected


@pytest.mark.slow
def test_a_comment_runs_nothing(finished, tmp_path):
    commented = tmp_path / "commented.yaml"
    commented.write_text("# a new comment\n" + (ROOT / "tests/fixtures/config_tiny.yaml").read_text())
    done = finished("-n", configfile=commented)
    assert job_stats(done.stdout + done.stderr) == {}


@pytest.mark.slow
def test_going_back_trains_nothing(finished):
    """After another config has run, the first one only aggregates."""
    other = put("experiments/tiny/table", {"decimals": 2})(tiny())
    assert finished(config=other).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (finished.folder / "results").glob("*/*/*") if path.is_file()}
    assert set(finished.jobs(tiny())) <= {"runs", "aggregate"}
    assert finished(config=tiny()).returncode == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path for path in before if before[path] != after[path]}
    assert not [path for path in changed if path.relative_to(finished.folder / "results").parts[0] != "tiny"]


@pytest.mark.slow
def test_a_failed_cell_is_shown_blocks_nothing_and_is_tried_again(finished):
    folder = finished.folder / "results" / "tiny"
    before = (folder / "summary.csv").read_bytes()
    raw = tiny()
    raw["finetunings"]["broken"] = {**raw["finetunings"]["plain"], "backbone": "resnet999"}
    raw["experiments"]["tiny"]["runs"]["broken"] = {"finetune": "broken"}
    for _ in range(2):  # an old table does not make the second try look finished
        done = finished(config=raw)
        assert done.returncode != 0
        table = (folder / "partial" / "table.md").read_text()
        assert "2 of 3 planned runs have finished" in table
        assert "unknown name 'resnet999'" in table
        assert (folder / "summary.csv").read_bytes() == before
    assert finished(config=tiny()).returncode == 0


@pytest.mark.slow
def test_a_table_of_another_config_is_not_taken_for_this_one(finished, tmp_path):
    """Copied results come without Snakemake's memory of what made them."""
    shutil.copytree(finished.folder / "results", tmp_path / "results")
    copy = Workflow(tmp_path)
    changed = put("finetunings/plain/lr", 0.02)(tiny())
    assert copy.jobs(changed) == {"finetune": 2, "evaluate": 2, "runs": 1, "aggregate": 1}


@pytest.mark.slow
def test_the_chain_ran_without_a_network(finished):
    """It did, on a machine whose network calls are refused: that they are is shown here."""
    code = "import socket; socket.create_connection(('{}', {}), timeout=5)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = code.format("localhost", server.getsockname()[1])
        subprocess.run([sys.executable, "-c", near], env=finished.environ, check=True)
    for host in ("192.0.2.1", "example.org"):
        call = [sys.executable, "-c", code.format(host, 80)]
        far = subprocess.run(call, env=finished.environ, capture_output=True, text=True, check=False)
        assert f"OSError: network call refused: {host}" in far.stderr
    assert "network call refused" not in finished.output


# without a finished run -----------------------------------------------------------------------------------------------


@pytest.fixture
def workflow(tmp_path):
    return Workflow(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("finetunings/plain/epoch", 3, "finetunings.plain.epoch: unknown key (value 3)"),
        ("noises/sym/rate", 1.5, "noises.sym.rate: need less than or equal to 1, got 1.5"),
        ("experiments/tiny/split", "nope", "unknown name 'nope'; choices: holdout"),
        ("pretrainings/base/method", "noise_mask", "noise_mask is not in this version"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(workflow, path, value, message):
    done = workflow("-n", config=put(path, value)(tiny()))
    assert done.returncode == 2
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not (workflow.folder / "results").exists()


@pytest.mark.parametrize("paper", sorted((ROOT / "config/papers").glob("*.yaml")), ids=lambda path: path.stem)
def test_planning_a_paper_finds_no_job_of_the_demo(workflow, paper):
    done = workflow("-n", configfile=paper)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digits" not in done.stdout + done.stderr
    assert set(yaml.safe_load(paper.read_text())["experiments"]).isdisjoint({"demo"})


def test_without_a_configfile_the_demo_is_planned(workflow):
    done = workflow("-n", configfile=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_stats(done.stdout + done.stderr)["pretrain_ddp"] == 2


@pytest.mark.parametrize(("ranks", "rule"), [(1, "pretrain"), (2, "pretrain_ddp")])
def test_weights_have_a_rule_of_their_own(workflow, ranks, rule):
    raw = tiny()
    base = {**raw["pretrainings"].pop("base"), "ranks": ranks}
    loaded = {"method": "weights", "source": "file", "file": "w.pt", "backbone": "small_cnn"}
    raw["pretrainings"] |= {"a": base, "b": {**base, "lr": 0.1}, "loaded": loaded}
    raw["finetunings"]["plain"]["image"] = {"size": 28}
    raw["experiments"]["tiny"]["runs"] = {
        name: {"pretrain": name, "finetune": "plain"} for name in ("a", "b", "loaded")
    } | {"scratch": {"finetune": "plain"}}
    jobs = workflow.jobs(raw)
    assert {name: count for name, count in jobs.items() if name in ("weights", "pretrain", "pretrain_ddp")} == {
        "weights": 1,
        rule: 2,
    }


@pytest.mark.parametrize(("stage", "rule"), [("finetunings", "finetune"), ("masks", "mask")])
def test_a_stage_starts_from_the_checkpoint_that_it_names(workflow, stage, rule):
    raw = tiny()
    raw["masks"] = {"seen": {"method": "xgradcam"}}
    plain = raw["finetunings"]["plain"]
    raw["finetunings"]["hidden"] = {**plain, "masks": "seen", "mask_rule": {"kind": "top_k"}}
    raw["experiments"]["tiny"]["runs"]["hidden"] = {"pretrain": "base", "finetune": "hidden"}
    raw["evaluations"]["default"]["coverages"] = [1.0]  # predicts with the network before masking too
    for block in raw[stage].values():
        block["checkpoint"] = "best"
    raw["experiments"]["tiny"]["runs"].pop("scratch")  # starts from no weights
    raw["experiments"]["tiny"]["reference"] = "pretrained"
    done = workflow("-n", config=raw)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"^(?:local)?rule (\w+):\n    input: (.*)$", done.stdout + done.stderr, re.MULTILINE)
    starts = [(name, Path(path).name) for name, line in jobs for path in line.split(", ") if "results/pretrain" in path]
    wanted = {"finetune": "model", "mask": "model", rule: "best"}
    wanted["evaluate"] = wanted["finetune"]
    assert {name for name, _ in starts} == set(wanted)
    assert {(name, path) for name, path in starts} == {(name, f"{wanted[name]}.safetensors") for name, _ in starts}


def with_masks(raw):
    raw["masks"] = {"grad": {"method": "gradcam", "needs": {"gpu": 0, "cpus": 1}}}
    hidden = {"masks": "grad", "mask_rule": {"kind": "top_k", "strength": 0.1}}
    raw["finetunings"]["masked"] = {**raw["finetunings"]["plain"], **hidden}
    raw["experiments"]["tiny"]["runs"]["masked"] = {"pretrain": "base", "finetune": "masked"}
    return raw


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        (lambda raw: raw, {"aggregate": 1}),
        (with_masks, {"aggregate": 1, "panels": 1}),
        (put("evaluations/default/coverages", [0.8, 1.0]), {"aggregate_selective": 1}),
    ],
)
def test_figures_that_only_some_experiments_have(workflow, change, jobs):
    planned = workflow.jobs(change(tiny()))
    named = ("aggregate", "aggregate_selective", "panels")
    assert {name: count for name, count in planned.items() if name in named} == jobs


@pytest.mark.slow
def test_rounds_of_cumulative_masks_with_continued_momenta(workflow):
    raw = tiny()
    raw["masks"] = {"grad": {"method": "gradcam", "needs": {"gpu": 0, "cpus": 1}}}
    raw["pretrainings"]["base"]["keep_optimizer"] = True
    rule = {"masks": "grad", "mask_rule": {"kind": "top_k", "strength": 0.1, "cumulative": True}}
    one = {**raw["finetunings"]["plain"], **rule, "keep_optimizer": True, "optimizer_state": "continued"}
    raw["finetunings"] |= {"one": one, "two": {**one, "after": "one"}}
    raw["experiments"]["tiny"] |= {"runs": {"two": {"pretrain": "base", "finetune": "two"}}, "reference": "two"}
    assert workflow.jobs(raw)["mask"] == 2
    done = workflow(config=raw)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert workflow.jobs(raw) == {}
    notes = [
        note for path in workflow.folder.glob("results/finetune/*/record.json") for note in io.read_json(path)["notes"]
    ]
    hidden = sorted(float(re.search(r"hide ([\d.]+)%", note)[1]) for note in notes if note.startswith("masks"))
    assert 9 < hidden[0] < 12 < hidden[1] < 22  # a tenth, then that and most of another


@pytest.mark.slow
def test_label_errors_are_found_once_and_then_removed_or_reweighted(workflow):
    pytest.importorskip("cleanlab", reason="pip install 'medmask[cleanlab]'")
    raw = tiny()
    raw["splits"]["holdout"]["sizes"] = {"train": 0.3, "val": 0.1, "test": 0.2}
    raw["finetunings"]["plain"] |= {"method": "confident", "folds": 2}
    choices = {"finetune": "plain", "set": {"finetune.errors": ["remove", "reweight"]}}
    raw["experiments"]["tiny"] |= {"runs": {"cleaned": choices}, "reference": "cleaned"}
    jobs = {"data": 1, "split": 1, "noise": 1, "audit": 1, "finetune": 2 + 2, "evaluate": 2, "runs": 1, "aggregate": 1}
    assert workflow.jobs(raw) == jobs
    done = workflow(config=raw)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert workflow.jobs(raw) == {}
    table = (workflow.folder / "results" / "tiny" / "table.md").read_text()
    assert "labels are probably wrong" in table
    assert "| cleaned (errors remove) | 3 |" in table  # epochs: its own, and those of two folds


def test_the_bare_profile_name_works():
    """`snakemake --profile slurm` finds the link in the root."""
    assert (ROOT / "slurm").is_symlink()
    assert (ROOT / "slurm" / "config.yaml").samefile(ROOT / "profiles" / "slurm" / "config.yaml")
    assert not (ROOT / "profiles" / "default").exists()  # would be merged over every profile


def test_quotes_and_dollars_reach_the_stage(workflow):
    """Text from a config is data for the shell, whatever is in it."""
    raw = tiny()
    raw["datasets"]["digits"] = {
        "reader": "csv",
        "folder": "a b",
        "labels": "x'$(touch pwned)`touch pwned`\"; touch pwned.csv",
    }
    raw["data_root"] = "$(touch pwned); 'x'"
    done = workflow(config=raw)
    assert done.returncode == 1
    assert not list(Path(workflow.folder).rglob("pwned"))
    assert "$(touch pwned); 'x'" in done.stdout + done.stderr


BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine to open the report with")
def test_the_report_opens_in_a_browser_without_a_network(finished, tmp_path):
    report = finished.folder / "results" / "tiny" / "report.html"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom", report.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    visible = re.sub(r"<script.*?</script>", "", page.split("<body", 1)[1], flags=re.DOTALL)
    assert re.search(r">Results<", visible)  # written by the page's scripts: they ran
    assert "Tables and figures of each experiment" in visible
