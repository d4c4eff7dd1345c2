# The bundles' commands. A finished file counts however old it is (ancient): a run is never repeated because a folder was
# copied. Other settings are refused when the plan is written.
wildcard_constraints:
    run="[^/]+",


# The output of a rule, by command and kind of run: what the next command of the run, or another run, starts from. A
# pre-training always ends with encoder.pt, beside network.pt if the decoder was trained as well.
RESULTS = {
    ("preparation", "prepare"): "data/dataset.json",
    ("pretraining", "train"): "train/models/encoder.pt",
    ("finetuning", "train"): "train/models/model.pt",
    ("finetuning", "evaluate"): "evaluation/scores.csv",
    ("propagation", "propagate"): "carried/propagation.csv",
    ("finetuning", "propagate"): "carried/propagation.csv",
    ("inference", "infer"): ".infer.done",  # not the table: Snakemake removes outputs, and by it a stopped run goes on
}


def result(name, place):
    """The output of one of the commands of a run: 0 the first, -1 the last."""
    return f"runs/{name}/" + RESULTS[RUNS[name]["kind"], RUNS[name]["commands"][place]["name"]]


def needed(wildcards):
    """What the runs that this one starts from have trained or written."""
    return [ancient(result(name, 0)) for name in RUNS[wildcards.run]["needs"]]


rule prepare:
    input:
        needed,
    output:
        "runs/{run}/data/dataset.json",
    threads: THREADS
    params:
        command=command("prepare"),
    resources:
        runtime=minutes,
    shell:
        job("prepare")


rule pretrain:
    input:
        needed,
    output:
        "runs/{run}/train/models/encoder.pt",
    threads: THREADS
    params:
        command=command("train"),
    resources:
        runtime=minutes,
        gpu=GPUS,
    shell:
        job("train", gpu=True)


rule carry_labels:
    input:
        needed,
    output:
        "runs/{run}/carried/propagation.csv",
    threads: THREADS
    params:
        command=command("propagate"),
    resources:
        runtime=minutes,
        gpu=GPUS,
    shell:
        job("propagate", gpu=True)


rule finetune:
    input:
        needed,
    output:
        "runs/{run}/train/models/model.pt",
    threads: THREADS
    params:
        command=command("train"),
    resources:
        runtime=minutes,
        gpu=GPUS,
    shell:
        job("train", gpu=True)


rule evaluate:
    input:
        ancient("runs/{run}/train/models/model.pt"),
    output:
        "runs/{run}/evaluation/scores.csv",
    threads: THREADS
    params:
        command=command("evaluate"),
    resources:
        runtime=minutes,
        gpu=GPUS,
    shell:
        job("evaluate", gpu=True)


rule infer:
    input:
        needed,
    output:
        "runs/{run}/.infer.done",
    threads: THREADS
    params:
        command=command("infer"),
    resources:
        runtime=minutes,
        gpu=GPUS,
    shell:
        job("infer", gpu=True)
