from snakemake.utils import min_version

min_version("9.27")

# Snakemake merges this file with the command line's; only one of the two is wanted
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/needs.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/mask.smk"
include: "workflow/rules/audit.smk"
include: "workflow/rules/results.smk"


localrules:
    all,
    runs,
    panels,
    aggregate,
    aggregate_selective,
    weights,
    pretrain_ddp,
    finetune_ddp,


rule all:
    default_target: True
    input:
        expand("results/{experiment}/summary.csv", experiment=EXPERIMENTS),
        # Snakemake would not ask for these where an older table stands
        [experiment_runs(experiment) for experiment in EXPERIMENTS],
        [path for experiment in EXPERIMENTS for path in evaluations(experiment)],
        [path for experiment in EXPERIMENTS for path in special_figures(experiment)],


onstart:
    check_site()


onsuccess:
    for experiment in EXPERIMENTS:
        finish_experiment(experiment)


onerror:
    for experiment in EXPERIMENTS:
        show_partial(experiment)
