# Parts of a study: scores and tables, chains of doubled steps, MLflow.
PARTS, CHAINS = PLAN["parts"], PLAN["chains"]
URI = f" --tracking_uri {shlex.quote(config['tracking_uri'])}" if config.get("tracking_uri") else ""


localrules:
    link,
    converged,
    scores_and_table,
    search_table,
    track,
    few_label_curve,
    headroom,
    ablation,
    search,
    study,


# The runs of one link are scored: does twice the steps follow?
checkpoint link:
    input:
        lambda wildcards: [
            ancient(result(name, -1)) for name in CHAINS[wildcards.n]["links"][wildcards.steps]
        ],
    output:
        "chains/n{n}_steps{steps}.json",
    shell:
        f"{PYTHON} -m evidence.chain --out {OUT_WORD} --result {OUT_WORD}/{{output}} {{wildcards.n}}"


def converged_runs(wildcards):
    """The runs with the steps that were chosen, once the chain has ended."""
    chain = CHAINS[wildcards.n]
    steps = next(iter(chain["links"]))
    while True:
        with checkpoints.link.get(n=wildcards.n, steps=steps).output[0].open() as file:
            state = json.load(file)
        if state["next"] is None:
            return [ancient(result(name, -1)) for name in chain["converged"].get(str(state["chosen"]), [])]
        steps = str(state["next"])


rule converged:
    input:
        converged_runs,
    output:
        touch("chains/n{n}.done"),


def runs_of(part):
    """Results of all its runs; the targets ask for them beside its table, which a report draws at any time."""
    return [result(name, -1) for name in PARTS[part]]


rule scores_and_table:
    input:
        runs=lambda wildcards: runs_of(wildcards.part),
        chains=lambda wildcards: [f"chains/n{n}.done" for n in CHAINS if wildcards.part == "headroom"],
    output:
        "{part}.md",
    wildcard_constraints:
        part="curve|headroom|ablation",
    shell:
        f"{PYTHON} -m evidence.report {OUT_WORD}"


rule search_table:
    input:
        lambda wildcards: runs_of("search"),
    output:
        "search.md",
    shell:
        f"{PYTHON} -m evidence.search --out {OUT_WORD}"


rule track:
    input:
        "{part}.md",
    output:
        touch(".tracked_{part}"),
    shell:
        f"{PYTHON} -m evidence.track --out {OUT_WORD}{URI}"


rule few_label_curve:
    input:
        ".tracked_curve",
        lambda wildcards: runs_of("curve"),


rule headroom:
    input:
        ".tracked_headroom",
        lambda wildcards: runs_of("headroom"),


rule ablation:
    input:
        ".tracked_ablation",
        lambda wildcards: runs_of("ablation"),


rule search:
    input:
        ".tracked_search",
        lambda wildcards: runs_of("search"),


# All parts that are reported, without the search.
rule study:
    input:
        [f".tracked_{part}" for part in PARTS if part != "search"],
        [runs_of(part) for part in PARTS if part != "search"],
    default_target: True
