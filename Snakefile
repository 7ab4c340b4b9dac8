from snakemake.utils import min_version

min_version("9.27")

# Snakemake merges this file with the command line's; only one of the two is wanted
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/results.smk"


localrules:
    all,
    runs,
    aggregate,
    pretrain_ddp,
    finetune_ddp,


rule all:
    default_target: True
    input:
        expand("results/{experiment}/summary.csv", experiment=EXPERIMENTS),


onsuccess:
    finish(complete=True)


onerror:
    finish(complete=False)
