# Saliency maps of a network, once for all rules and strengths of the finetunings that use them.
rule mask:
    input:
        images=upstream("mask", "data", "images.npy"),
        index=upstream("mask", "data", "index.npy"),
        split=upstream("mask", "split", "split.csv"),
        summary=upstream("mask", "split", "split.json"),
        model=explained,
    output:
        maps="results/mask/{key}/maps.safetensors",
        record="results/mask/{key}/record.json",
    log:
        "logs/mask/{key}.log",
    threads: cores("mask")
    resources:
        **needs("mask"),
    params:
        config=settings("mask"),
        work="work/mask-{key}",
    shell:
        "python -m medmask mask --config {params.config:q} --images {input.images:q} --index {input.index:q}"
        " --split {input.split:q} --summary {input.summary:q} --model {input.model:q} --work-dir {params.work:q}"
        " --maps {output.maps:q} --record {output.record:q} 2>&1 | tee -i {log:q}"
