# Saliency maps of a network, once for all rules and strengths of the finetunings that use them.
rule mask:
    input:
        unpack(mask_inputs),
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
        files=training_flags,
        work="work/mask-{key}",
    shell:
        "python -m medmask mask --config {params.config:q} {params.files} --work-dir {params.work:q}"
        " --maps {output.maps:q} --record {output.record:q} 2>&1 | tee -i {log:q}"
