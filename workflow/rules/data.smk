rule data:
    output:
        manifest="results/data/{key}/manifest.csv",
        images="results/data/{key}/images.npy",
        index="results/data/{key}/index.npy",
        dataset="results/data/{key}/dataset.json",
    log:
        "logs/data/{key}.log",
    threads: cores("data")
    resources:
        **needs("data"),
    params:
        config=settings("data"),
        data_root=PLAN.blocks.config.data_root,
    shell:
        "python -m medmask data --config {params.config:q} --data-root {params.data_root:q} --manifest {output.manifest:q}"
        " --images {output.images:q} --index {output.index:q} --dataset {output.dataset:q} 2>&1 | tee -i {log:q}"


rule split:
    input:
        manifest=upstream("split", "data", "manifest.csv"),
        dataset=upstream("split", "data", "dataset.json"),
    output:
        split="results/split/{key}/split.csv",
        summary="results/split/{key}/split.json",
    log:
        "logs/split/{key}.log",
    threads: cores("split")
    resources:
        **needs("split"),
    params:
        config=settings("split"),
    shell:
        "python -m medmask split --config {params.config:q} --manifest {input.manifest:q} --dataset {input.dataset:q}"
        " --split {output.split:q} --summary {output.summary:q} 2>&1 | tee -i {log:q}"


rule noise:
    input:
        split=upstream("noise", "split", "split.csv"),
        summary=upstream("noise", "split", "split.json"),
    output:
        labels="results/noise/{key}/labels.csv",
        transition="results/noise/{key}/transition.json",
        figure="results/noise/{key}/transition.png",
    log:
        "logs/noise/{key}.log",
    threads: cores("noise")
    resources:
        **needs("noise"),
    params:
        config=settings("noise"),
    shell:
        "python -m medmask noise --config {params.config:q} --split {input.split:q} --summary {input.summary:q}"
        " --labels {output.labels:q} --transition {output.transition:q} --figure {output.figure:q} 2>&1 | tee -i {log:q}"
