# Labels that are probably wrong, once for all that is then done about them. The networks are finetunings of their own.
rule audit:
    input:
        images=upstream("audit", "data", "images.npy"),
        index=upstream("audit", "data", "index.npy"),
        split=upstream("audit", "split", "split.csv"),
        summary=upstream("audit", "split", "split.json"),
        labels=upstream("audit", "noise", "labels.csv"),
        networks=fold_networks,
    output:
        audit="results/audit/{key}/audit.csv",
        record="results/audit/{key}/record.json",
    log:
        "logs/audit/{key}.log",
    threads: cores("audit")
    resources:
        **needs("audit"),
    params:
        config=settings("audit"),
    shell:
        "python -m medmask audit --config {params.config:q} --images {input.images:q} --index {input.index:q}"
        " --split {input.split:q} --summary {input.summary:q} --labels {input.labels:q} --networks {input.networks:q}"
        " --audit {output.audit:q} --record {output.record:q} 2>&1 | tee -i {log:q}"
