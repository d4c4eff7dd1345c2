# Cross-validation and Decathlon: the table of all folds, the ensemble's masks, the archive for the leaderboard.
ENDS = PLAN["ends"]


localrules:
    table,
    submit,
    cross_validation,
    decathlon,


rule table:
    input:
        lambda wildcards: [ancient(result(name, -1)) for name in ENDS["finetuning"]],
    output:
        "results/results.md",
    params:
        command=lambda wildcards: words_of("table", "results"),
    shell:
        job("results").replace("{wildcards.run}", "table")


rule submit:
    input:
        lambda wildcards: [ancient(result(name, -1)) for name in ENDS["inference"]],
    output:
        "submission.zip",
    params:
        command=lambda wildcards: words_of("submission", "submit"),
    shell:
        job("submit").replace("{wildcards.run}", "submission")


# Folds, their table, and the masks of the ensemble where one is asked for.
rule cross_validation:
    input:
        "results/results.md",
        [result(name, -1) for name in (*ENDS["finetuning"], *ENDS["inference"])],
    default_target: True


# The same for all tasks, and the leaderboard's archive where one is asked for.
rule decathlon:
    input:
        rules.cross_validation.input,
        ["submission.zip"] if "submission" in RUNS else [],
