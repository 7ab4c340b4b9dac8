"""A cell at a seed becomes artifacts. Imports no torch and no numpy."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmask.artifacts import Artifact, make_artifact, readable
from medmask.checks import check_trusted
from medmask.config.finetuning import Audit, ConfidentLearning, Explanation, Finetuning, MaskRule, Source
from medmask.config.load import Blocks
from medmask.config.training import Training, Weights
from medmask.errors import ConfigError, lookup
from medmask.grid import Cell, cells


@dataclass(frozen=True)
class Run:
    """A cell at one seed, with the artifacts it needs by stage."""

    cell: Cell
    seed: int
    artifacts: dict[str, Artifact]


class Builder:
    """Turns cells into artifacts; each distinct artifact is made once."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.made: dict[tuple, Artifact] = {}

    def make(self, *args: Any, **kwargs: Any) -> Artifact:
        artifact = make_artifact(*args, **kwargs)
        return self.made.setdefault((artifact.digest,), artifact)

    def run(self, cell: Cell, seed: int) -> Run:
        """All artifacts of one run; a network that has trained on its test images is refused."""
        data = self.data(cell, seed)
        network = self.network(cell, seed, ())
        evaluation = self.blocks.block("evaluate", cell.evaluate, cell.changes("evaluate"), cell.where())
        if evaluation.leak == "refuse":
            self.refuse_leak(cell, data, network)
        selective = {"init": before_masks(network)} if evaluation.coverages and "masks" in network.inputs else {}
        evaluate = self.make(
            "evaluate",
            evaluation,
            name=network.key.rsplit("-", 1)[0],
            inputs={"data": data["data"], "split": data["split"], "model": network, **selective},
        )
        evaluate.settings.pop("metrics", None)
        start = network.inputs.get("init") if network.stage == "finetune" else network
        found = {"mask": network.inputs.get("masks"), "audit": network.inputs.get("audit")}
        stages = {**data, "pretrain": start, **found, "finetune": network, "evaluate": evaluate}
        return Run(cell, seed, {s: a for s, a in stages.items() if a is not None and (a.stage == s)})

    def data(self, cell: Cell, seed: int) -> dict[str, Artifact]:
        """The artifacts data, split and noise of a cell."""
        seed = self.seed(cell, "noise", seed)
        memo = (
            "data",
            cell.dataset,
            cell.split,
            cell.noise,
            tuple(map(cell.changes, ("dataset", "split", "noise"))),
            seed,
        )
        if memo not in self.made:
            where = cell.where()
            dataset, split, noise = (
                self.blocks.block(field, getattr(cell, field), cell.changes(field), where)
                for field in ("dataset", "split", "noise")
            )
            source = readable(dataset.reader.rsplit(":", 1)[-1])
            code = reader_code(dataset.reader, f"datasets.{cell.dataset}") if ".py:" in dataset.reader else None
            data = self.make("data", dataset, name=f"{source}_data", inputs={}, code=code)
            sides = self.make("split", split, name=f"{source}_{split.kind}", inputs={"data": data})
            flips = noise.kind != "none"
            name = f"{source}_{noise.kind}" + (f"{noise.rate:g}" if flips else "")
            labels = self.make("noise", noise, name=name, inputs={"split": sides}, seed=seed if flips else None)
            self.made[memo] = {"data": data, "split": sides, "noise": labels}  # type: ignore[assignment]
        return self.made[memo]  # type: ignore[return-value]

    def seed(self, cell: Cell, stage: str, seed: int) -> int:
        return seed if stage in self.blocks.config.experiments[cell.experiment].seed_stages else 0

    def network(self, cell: Cell, seed: int, path: tuple) -> Artifact:
        """The artifact that holds the network of a cell: its finetuning, or its pretraining if it has none."""
        path = extended(path, (cell.run, cell.noise, cell.finetune, cell.pretrain), cell)
        if cell.finetune != "none":
            return self.finetune(cell, seed, path)
        start = self.start(cell, seed, path)
        if start is None:
            raise ConfigError(f"{cell.where()}: `pretrain: none` with `finetune: none` leaves nothing to evaluate")
        return start

    def start(self, cell: Cell, seed: int, path: tuple) -> Artifact | None:
        """Starting weights: a pretraining, the network of another run, or none."""
        if isinstance(cell.pretrain, Source):
            return self.network(self.resolve(cell, cell.pretrain, "pretrain"), seed, path)
        return None if cell.pretrain == "none" else self.pretrain(cell, seed)

    def pretrain(self, cell: Cell, seed: int) -> Artifact:
        block = self.blocks.block("pretrain", str(cell.pretrain), cell.changes("pretrain"), cell.where())
        if isinstance(block, Weights):
            name = f"{block.source}_weights"
            return self.make("pretrain", block, name=name, inputs={}, backbone=block.backbone)
        if block.backbone is None:
            raise ConfigError(f"pretrainings.{cell.pretrain}.backbone: a needed key is missing")
        return self.training("pretrain", block, cell, seed, {})

    def finetune(self, cell: Cell, seed: int, path: tuple) -> Artifact:
        block = self.blocks.block("finetune", cell.finetune, cell.changes("finetune"), cell.where())
        where = f"finetunings.{cell.finetune}"
        if block.after is not None:
            before = cell.with_blocks(finetune=block.after)
            init: Artifact | None = self.network(before, seed, path)
        else:
            init = self.start(cell, seed, path)
        inputs = {"init": init} if init else {}
        if init is None and block.backbone is None:
            raise ConfigError(f"{where}.backbone: a needed key is missing: {cell.where()} starts from no weights")
        if init is not None and block.backbone not in (None, init.backbone):
            raise ConfigError(f"{where}.backbone: {block.backbone} contradicts the starting weights, {init.backbone}")
        if init is None and block.freeze != "none":
            raise ConfigError(
                f"{where}.freeze: {block.freeze} would keep random weights: {cell.where()} starts from none"
            )
        if init is None and block.checkpoint != "last":
            raise ConfigError(f"{where}.checkpoint: {cell.where()} starts from no weights, so it has no best epoch")
        if "teacher" in type(block).model_fields:
            if (teacher := block.teacher) is None:
                raise ConfigError(f"{where}.teacher: needed by `method: {block.method}`")
            inputs["teacher"] = self.network(self.resolve(cell, teacher, "finetune"), seed, path)
        if block.masks is not None:
            if init is None:
                raise ConfigError(f"{where}.masks: there are no starting weights to take them from")
            inputs["masks"] = self.masks(block, cell, seed, init)
        if block.optimizer_state == "continued":
            refuse_lost_momenta(block, init, where)
        if isinstance(block, ConfidentLearning):
            inputs["audit"] = self.audit(block, cell, seed, inputs)
        return self.training("finetune", block, cell, seed, inputs)

    def masks(self, block: Finetuning, cell: Cell, seed: int, model: Artifact) -> Artifact:
        """Saliency maps of the starting network, after those of the rounds before where masks are cumulative."""
        maps = self.blocks.block("mask", str(block.masks), cell.changes("mask"), cell.where())
        where = cell.with_blocks(**block.data.model_dump()) if block.data is not None else cell
        inputs = {**{role: a for role, a in self.data(where, seed).items() if role != "noise"}, "model": model}
        assert block.mask_rule is not None
        before, hidden_by = round_before(model, inputs["split"]), None
        if block.mask_rule.cumulative and before is not None:
            rule = {**before.settings["mask_rule"], "cumulative": True}
            inputs["earlier"], hidden_by = before.inputs["masks"], MaskRule(**rule)
            if hidden_by != block.mask_rule:
                raise ConfigError(
                    f"finetunings.{cell.finetune}.mask_rule: cumulative masks need one rule in all rounds, and "
                    f"{cell.where()} starts from another: {hidden_by.model_dump(exclude_defaults=True)}"
                )
        explanation = Explanation(**maps.model_dump(), hidden_by=hidden_by)
        return self.make("mask", explanation, name=model.key.rsplit("-", 1)[0], inputs=inputs)

    def audit(self, block: ConfidentLearning, cell: Cell, seed: int, models: dict[str, Artifact]) -> Artifact:
        """The labels as judged by a training for each fold, alike but for the images that it leaves out."""
        where = cell.with_blocks(**block.data.model_dump()) if block.data is not None else cell
        data = self.data(where, seed)
        seen = {source for model in models.values() for source, *_ in model.trained_on}
        if self.source(where) in seen:  # by whatever split
            raise ConfigError(
                f"finetunings.{cell.finetune}: {cell.where()} starts from a network that has trained on the "
                "images whose labels it is to judge; start `method: confident` from other weights, or from none"
            )
        folds = [self.training("finetune", block.left_out(fold), cell, seed, models) for fold in range(block.folds)]
        return self.make(
            "audit",
            Audit(folds=block.folds, train_on=block.train_on, needs=block.needs),
            name=f"{data['data'].key.split('_')[0]}_confident",
            inputs={**data, **{f"fold{number}": network for number, network in enumerate(folds)}},
            seed=self.seed(cell, "finetune", seed),
        )

    def training(self, stage: str, block: Training, cell: Cell, seed: int, models: dict[str, Artifact]) -> Artifact:
        """A pretraining or finetuning on the run's data or on the block's own."""
        if block.data is not None:
            cell = cell.with_blocks(**block.data.model_dump())
        data = self.data(cell, seed)
        check_trusted(block, data["split"].settings.get("meta_set"), cell)
        init = models.get("init")
        trained = {(self.source(cell), data["data"].digest, data["split"].digest)}
        ignore = {"backbone"} if init else set()
        if block.sync_bn:
            ignore.add("ranks")  # the same network whatever their number
        return self.make(
            stage,
            block,
            name=f"{data['data'].key.split('_')[0]}_{readable(block.method)}",  # type: ignore[attr-defined]
            inputs={**data, **models},
            seed=self.seed(cell, stage, seed),
            ignore=frozenset(ignore),
            backbone=init.backbone if init else block.backbone,
            trained_on=frozenset(trained).union(*(model.trained_on for model in models.values())),
        )

    def source(self, cell: Cell) -> str:
        dataset = self.blocks.block("dataset", cell.dataset, cell.changes("dataset"))
        return f"{dataset.reader}:{dataset.folder}"

    def refuse_leak(self, cell: Cell, data: dict[str, Artifact], network: Artifact) -> None:
        """A network that trained on the run's own source must have used the run's own split."""
        own = (self.source(cell), data["data"].digest, data["split"].digest)
        for other in network.trained_on:
            if other[0] == own[0] and other != own:
                raise ConfigError(
                    f"{cell.where()}: a network it starts from or learns from has trained on the test images of "
                    f"dataset {cell.dataset}, split {cell.split} (it used another split of the same images); "
                    "give it the run's split, or count the leak with `evaluations.<name>.leak: count`"
                )

    def resolve(self, cell: Cell, source: Source, replaced: str) -> Cell:
        """The cell that a `{run: ..., field: ...}` stands for, seen from `cell`."""
        changes = {field: name for field, name in source.model_dump().items() if field != "run" and name is not None}
        if source.run is None:
            if not changes:
                raise ConfigError(f"{cell.where()}: a source needs `run` or a changed field")
            return cell.with_blocks(**changes)
        experiment = self.blocks.config.experiments[cell.experiment]
        lookup(experiment.runs, source.run, f"{cell.where()}.{replaced}.run")
        found = [
            other
            for other in cells(cell.experiment, experiment, only=source.run)
            if all(getattr(other, field) == name for field, name in changes.items())
        ]
        for key, value in cell.fields().items():  # of several cells take those that share the run's own choices
            same = [other for other in found if other.fields().get(key) == value]
            found = same if len(found) > 1 and same else found
        if len(found) != 1:
            raise ConfigError(
                f"{cell.where()}.{replaced}: {source.run!r} stands for {len(found)} runs a seed, need one; "
                "name its fields beside `run`"
            )
        return found[0]


def refuse_lost_momenta(block: Finetuning, init: Artifact | None, where: str) -> None:
    """Momenta can be gone on with only where the starting network has kept them, and is the last one."""
    start = init.settings if init is not None else {}
    same = start.get("optimizer", "sgd") == block.optimizer and block.checkpoint == "last"
    if not (same and start.get("keep_optimizer", False)):
        raise ConfigError(
            f"{where}.optimizer_state: to be continued it needs a start from the last epoch of a training with "
            "`keep_optimizer: true` and the same `optimizer`"
        )


def round_before(network: Artifact | None, split: Artifact) -> Artifact | None:
    """The newest training, of these and those it started from, that has hidden parts of the images of this split."""
    while network is not None:
        masks = network.inputs.get("masks")
        if masks is not None and masks.inputs["split"].digest == split.digest:
            return network
        network = network.inputs.get("init")
    return None


def before_masks(network: Artifact) -> Artifact:
    """The network that the first finetuning on masked images started from."""
    return before_masks(network.inputs["init"]) if "masks" in network.inputs else network


def extended(path: tuple, step: tuple, cell: Cell) -> tuple:
    """The way from a run to its sources, one step longer; ConfigError when it meets itself."""
    if step in path:
        way = [*path, step]
        rows = len({run for run, *_ in way}) > 1
        names = " -> ".join(str(run if rows else finetune) for run, _, finetune, _ in way)
        raise ConfigError(f"{cell.where()}: its sources go in a circle: {names}")
    return (*path, step)


def reader_code(reader: str, where: str) -> str:
    """What a user's reader file says, without its comments and layout, so that only a real change makes a new key."""
    path = Path(reader.rsplit(":", 1)[0])
    try:
        return ast.dump(ast.parse(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{where}.reader: cannot read {path} from {Path.cwd()}: {error.strerror}") from error
    except SyntaxError as error:
        raise ConfigError(f"{where}.reader: {path}:{error.lineno}: not Python: {error.msg}") from error
