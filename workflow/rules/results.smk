rule evaluate:
    input:
        images=upstream("evaluate", "data", "images.npy"),
        index=upstream("evaluate", "data", "index.npy"),
        split=upstream("evaluate", "split", "split.csv"),
        summary=upstream("evaluate", "split", "split.json"),
        model=upstream("evaluate", "model", "model.safetensors"),
        best=upstream("evaluate", "model", "best.safetensors"),
        init=before_masks,
    output:
        predictions="results/evaluate/{key}/predictions.csv",
        predictions_best="results/evaluate/{key}/predictions_best.csv",
        metrics="results/evaluate/{key}/metrics.json",
    log:
        "logs/evaluate/{key}.log",
    threads: cores("evaluate")
    resources:
        **needs("evaluate"),
    params:
        config=settings("evaluate"),
        init=lambda wc, input: f"--init {shlex.quote(str(input.init))}" if input.init else "",
    shell:
        "python -m medmask evaluate --config {params.config:q} --images {input.images:q} --index {input.index:q}"
        " --split {input.split:q} --summary {input.summary:q} --model {input.model:q} --best {input.best:q} {params.init}"
        " --predictions {output.predictions:q} --predictions-best {output.predictions_best:q}"
        " --metrics {output.metrics:q} 2>&1 | tee -i {log:q}"


rule runs:
    output:
        "results/runs/{experiment}-{digest}/runs.json",
    log:
        "logs/runs/{experiment}-{digest}.log",
    wildcard_constraints:
        digest="[0-9a-f]{12}",
    priority: 1
    params:
        config=lambda wc: json.dumps({"experiment": wc.experiment, "config": PLAN.blocks.raw}),  # rows keep their order
    shell:
        "python -m medmask runs --config {params.config:q} --runs {output:q} 2>&1 | tee -i {log:q}"


# What networks look at: this needs their weights, and only experiments with masks have it.
rule panels:
    input:
        runs=lambda wc: experiment_runs(wc.experiment),
        evaluations=lambda wc: evaluations(wc.experiment),
    output:
        in_report("panels_png", "figures/panels.png"),
    log:
        "logs/panels/{experiment}.log",
    shell:
        "python -m medmask panels --config '{{}}' --runs {input.runs:q} --panels {output:q} 2>&1 | tee -i {log:q}"


rule aggregate:
    input:
        runs=lambda wc: experiment_runs(wc.experiment),
        evaluations=lambda wc: evaluations(wc.experiment),
        panels=lambda wc: panels(wc.experiment),
    output:
        **aggregate_outputs(),
    log:
        "logs/aggregate/{experiment}.log",
    wildcard_constraints:
        experiment=by_coverages(False),
    params:
        arguments=lambda wc: aggregate_arguments(wc.experiment, f"results/{wc.experiment}"),
    shell:
        "python -m medmask aggregate {params.arguments} 2>&1 | tee -i {log:q}"


use rule aggregate as aggregate_selective with:
    output:
        **aggregate_outputs(selective=True),
    wildcard_constraints:
        experiment=by_coverages(True),
