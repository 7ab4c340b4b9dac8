# One process is a job of its own; more are started by the launcher, from here. The launcher
# submits again what a cluster ended, so these rules are not retried. Weights that are only loaded
# may have to be fetched, so that is done here too: nodes often have no internet.
LOADED = "[a-z]+_weights-[0-9a-f]{12}"


rule weights:
    output:
        model="results/pretrain/{key}/model.safetensors",
        best="results/pretrain/{key}/best.safetensors",
        history="results/pretrain/{key}/history.jsonl",
        record="results/pretrain/{key}/record.json",
    log:
        "logs/pretrain/{key}.log",
    wildcard_constraints:
        key=LOADED,
    params:
        config=settings("pretrain"),
        work="work/{key}",
    shell:
        "python -m medmask pretrain --config {params.config:q} --work-dir {params.work:q} --model {output.model:q}"
        " --best {output.best:q} --history {output.history:q} --record {output.record:q} 2>&1 | tee -i {log:q}"


rule pretrain:
    input:
        unpack(training_inputs("pretrain")),
    output:
        model="results/pretrain/{key}/model.safetensors",
        best="results/pretrain/{key}/best.safetensors",
        history="results/pretrain/{key}/history.jsonl",
        record="results/pretrain/{key}/record.json",
    log:
        "logs/pretrain/{key}.log",
    wildcard_constraints:
        key=f"(?!{LOADED}/)(?:{by_ranks('pretrain')[0]})",
    threads: cores("pretrain")
    resources:
        **needs("pretrain"),
    params:
        config=settings("pretrain"),
        files=training_flags,
        work="work/{key}",
    shell:
        "python -m medmask pretrain --config {params.config:q} {params.files} --work-dir {params.work:q} --model {output.model:q}"
        " --best {output.best:q} --history {output.history:q} --record {output.record:q} 2>&1 | tee -i {log:q}"


rule pretrain_ddp:
    input:
        unpack(training_inputs("pretrain")),
    output:
        model="results/pretrain/{key}/model.safetensors",
        best="results/pretrain/{key}/best.safetensors",
        history="results/pretrain/{key}/history.jsonl",
        record="results/pretrain/{key}/record.json",
    log:
        "logs/pretrain/{key}.log",
    wildcard_constraints:
        key=by_ranks("pretrain")[1],
    retries: 0
    threads: launcher_cores("pretrain")
    resources:
        **needs("pretrain"),
        ddp_jobs=1,
    params:
        config=settings("pretrain"),
        files=training_flags,
        work="work/{key}",
        launch=launch_flags("pretrain"),
    shell:
        "python -m medmask.launch {params.launch} --work-dir {params.work:q} --"
        " pretrain --config {params.config:q} {params.files} --work-dir {params.work:q} --model {output.model:q}"
        " --best {output.best:q} --history {output.history:q} --record {output.record:q} 2>&1 | tee -i {log:q}"


rule finetune:
    input:
        unpack(training_inputs("finetune")),
    output:
        model="results/finetune/{key}/model.safetensors",
        best="results/finetune/{key}/best.safetensors",
        history="results/finetune/{key}/history.jsonl",
        weights="results/finetune/{key}/weights.csv",
        soft_labels="results/finetune/{key}/soft_labels.csv",
        record="results/finetune/{key}/record.json",
    log:
        "logs/finetune/{key}.log",
    wildcard_constraints:
        key=by_ranks("finetune")[0],
    threads: cores("finetune")
    resources:
        **needs("finetune"),
    params:
        config=settings("finetune"),
        files=training_flags,
        work="work/{key}",
    shell:
        "python -m medmask finetune --config {params.config:q} {params.files} --work-dir {params.work:q} --model {output.model:q}"
        " --best {output.best:q} --history {output.history:q} --weights {output.weights:q}"
        " --soft-labels {output.soft_labels:q} --record {output.record:q} 2>&1 | tee -i {log:q}"


rule finetune_ddp:
    input:
        unpack(training_inputs("finetune")),
    output:
        model="results/finetune/{key}/model.safetensors",
        best="results/finetune/{key}/best.safetensors",
        history="results/finetune/{key}/history.jsonl",
        weights="results/finetune/{key}/weights.csv",
        soft_labels="results/finetune/{key}/soft_labels.csv",
        record="results/finetune/{key}/record.json",
    log:
        "logs/finetune/{key}.log",
    wildcard_constraints:
        key=by_ranks("finetune")[1],
    retries: 0
    threads: launcher_cores("finetune")
    resources:
        **needs("finetune"),
        ddp_jobs=1,
    params:
        config=settings("finetune"),
        files=training_flags,
        work="work/{key}",
        launch=launch_flags("finetune"),
    shell:
        "python -m medmask.launch {params.launch} --work-dir {params.work:q} --"
        " finetune --config {params.config:q} {params.files} --work-dir {params.work:q} --model {output.model:q}"
        " --best {output.best:q} --history {output.history:q} --weights {output.weights:q}"
        " --soft-labels {output.soft_labels:q} --record {output.record:q} 2>&1 | tee -i {log:q}"
