# Copyright (c) the swin-unetr-bundles contributors. Licensed under the Apache License 2.0.
"""The table of volumes counts voxels in mm, and survives interrupted runs."""

from __future__ import annotations

import csv
import logging
import time

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from bundles.common.errors import InputError
from bundles.segmentation.results.organ_volumes import (
    OrganVolumes,
    organ_volumes,
    read_cases,
    read_volumes,
    volumes_table,
)

LABELS = {"0": "background", "1": "liver", "2": "left kidney", "3": "never there"}


def item_of(file: str, counts: dict[int, int], spacing=(1.0, 1.0, 1.0), dtype=np.uint8) -> dict:
    mask = np.zeros(1000, dtype=dtype)
    begin = 0
    for value, count in counts.items():
        mask[begin : begin + count] = value
        begin += count
    return {
        "image": MetaTensor(torch.zeros(1, 2, 2, 2), meta={"filename_or_obj": file}),
        "pred": MetaTensor(torch.from_numpy(mask.reshape(1, 10, 10, 10)), affine=np.diag([*spacing, 1.0])),
    }


def run(handler: OrganVolumes, batches: list) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    engine.run(batches)
    return engine


def rows_of(folder) -> list[list[str]]:
    with open(folder / "volumes.csv", newline="") as file:
        return list(csv.reader(file))


def test_each_case_has_a_row_per_organ_in_voxels_and_millilitres(tmp_path):
    first = item_of("d/c2.nii.gz", {1: 400, 2: 7}, spacing=(-0.5, 2.0, 3.0))  # 3 mm^3 a voxel
    second = item_of("d/c1.nii.gz", {2: 250})
    run(OrganVolumes(LABELS, tmp_path / "masks"), [[first], [second]])
    assert rows_of(tmp_path / "masks") == [
        ["case", "label", "voxels", "ml", "image"],
        ["c1", "liver", "0", "0.000", "d/c1.nii.gz"],
        ["c1", "left kidney", "250", "0.250", "d/c1.nii.gz"],
        ["c1", "never there", "0", "0.000", "d/c1.nii.gz"],
        ["c2", "liver", "400", "1.200", "d/c2.nii.gz"],
        ["c2", "left kidney", "7", "0.021", "d/c2.nii.gz"],
        ["c2", "never there", "0", "0.000", "d/c2.nii.gz"],
    ]
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["labels.ctbl", "volumes.csv"]


def test_a_voxel_of_a_sheared_and_turned_grid_has_the_volume_of_its_parallelepiped():
    item = item_of("a.nii.gz", {1: 1000})
    turned = np.array([[0.6, -0.8, 0, 5], [0.8, 0.6, 0, 6], [0, 0.3, 2.5, 7], [0, 0, 0, 1]])
    item["pred"].affine = torch.from_numpy(turned)
    assert organ_volumes(item["pred"], labels={1: "liver"}) == [
        {"label": "liver", "voxels": 1000, "ml": pytest.approx(2.5)}
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_labels_beyond_a_byte_and_whole_floats_are_counted(dtype):
    item = item_of("a.nii.gz", {300: 12, 44: 5}, dtype=dtype)  # 300 is 44 in a byte
    volumes = organ_volumes(item["pred"], labels={300: "rib", 44: "other"})
    assert [row["voxels"] for row in volumes] == [12, 5]


def test_a_stopped_run_keeps_the_cases_that_it_has(tmp_path):
    seen = []

    def stop(engine, batch):
        seen.append([row[0] for row in rows_of(tmp_path)[1:]] if (tmp_path / "volumes.csv").exists() else [])
        if batch is None:
            raise KeyboardInterrupt
        return batch

    engine = Engine(stop)
    OrganVolumes({1: "liver"}, tmp_path).attach(engine)
    with pytest.raises(KeyboardInterrupt):
        engine.run([[item_of("a.nii.gz", {1: 5})], [item_of("b.nii.gz", {1: 5})], None])
    assert seen == [[], ["a"], ["a", "b"]]
    assert [row[0] for row in rows_of(tmp_path)[1:]] == ["a", "b"]


def test_a_second_run_starts_afresh(tmp_path):
    handler = OrganVolumes({1: "liver"}, tmp_path)
    run(handler, [[item_of("a.nii.gz", {1: 5})]])
    run(handler, [[item_of("b.nii.gz", {1: 5})]])
    assert [row[0] for row in rows_of(tmp_path)[1:]] == ["b"]


def test_a_resumed_run_keeps_the_rows_that_are_there(tmp_path):
    run(OrganVolumes({1: "liver"}, tmp_path), [[item_of("d/b.nii.gz", {1: 5}, spacing=(0.5, 1, 1))]])
    before = rows_of(tmp_path)[1]
    run(OrganVolumes({1: "liver"}, tmp_path, resume=True), [[item_of("d/a.nii.gz", {1: 3})]])
    assert rows_of(tmp_path)[1:] == [["a", "liver", "3", "0.003", "d/a.nii.gz"], before]
    run(OrganVolumes({1: "liver"}, tmp_path / "new", resume=True), [[item_of("d/a.nii.gz", {1: 3})]])
    assert len(rows_of(tmp_path / "new")) == 2


def test_a_run_that_is_killed_leaves_no_row_of_what_it_was_to_segment_again(tmp_path):
    run(OrganVolumes({1: "liver"}, tmp_path), [[item_of("a.nii.gz", {1: 5}), item_of("b.nii.gz", {1: 6})]])

    def killed(engine):
        raise KeyboardInterrupt

    handler = OrganVolumes({1: "liver"}, tmp_path, resume=True, again=["b.nii.gz"])
    engine = Engine(lambda engine, batch: batch)
    handler.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, killed)
    with pytest.raises(KeyboardInterrupt):
        engine.run([[item_of("b.nii.gz", {1: 7})]])
    assert [row[0] for row in rows_of(tmp_path)[1:]] == ["a"]
    run(OrganVolumes({1: "liver"}, tmp_path, resume=True, again=["b.nii.gz"]), [[item_of("b.nii.gz", {1: 7})]])
    assert [(row[0], row[2]) for row in rows_of(tmp_path)[1:]] == [("a", "5"), ("b", "7")]


def test_equal_names_in_two_folders_stay_apart_and_a_repeated_case_counts_once(tmp_path):
    items = [item_of(f"{folder}/ct.nii.gz", {1: count}) for folder, count in (("p2", 7), ("p1", 5), ("p1", 5))]
    run(OrganVolumes({1: "liver"}, tmp_path), [[item] for item in items])
    rows = [(row[0], row[2], row[4]) for row in rows_of(tmp_path)[1:]]
    assert rows == [("ct", "5", "p1/ct.nii.gz"), ("ct", "7", "p2/ct.nii.gz")]


def test_an_empty_mask_is_warned_of_by_the_name_of_its_scan(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(OrganVolumes(LABELS, tmp_path), [[item_of("d/empty.nii.gz", {})], [item_of("d/full.nii.gz", {1: 1})]])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "d/empty.nii.gz: the mask is all background" in messages[0]
    assert "liver, left kidney" in messages[0]


def test_a_mask_without_geometry_is_named(tmp_path):
    item = item_of("d/c1.nii.gz", {1: 1})
    with pytest.raises(InputError, match=r"'pred' of the case d/c1.nii.gz .* is Tensor of shape \(1, 10, 10, 10\)"):
        run(OrganVolumes(LABELS, tmp_path), [[item | {"pred": item["pred"].as_tensor()}]])


def measure_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # One case is in both shares, as the sampler of a distributed run repeats cases to make shares equal.
    names = ["a", "b"] if rank == 0 else ["c", "d", "a"]
    batches = [[item_of(f"d/{name}.nii.gz", {1: 10 * ord(name)})] for name in names]
    run(OrganVolumes({1: "liver"}, f"{folder}/rank{rank}"), batches)
    torch.distributed.destroy_process_group()


def test_two_processes_write_one_table_of_all_cases(tmp_path):
    # Forked, since importing MONAI in each process takes longer than everything else in this file.
    processes = torch.multiprocessing.start_processes(
        measure_on_one_rank, (str(tmp_path),), nprocs=2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 60
    while not processes.join(timeout=1):
        assert time.monotonic() < deadline, "the two processes wait for each other"
    rows = [(row[0], int(row[2])) for row in rows_of(tmp_path / "rank0")[1:]]
    assert rows == [(name, 10 * ord(name)) for name in "abcd"]
    assert not (tmp_path / "rank1").exists()


def test_cases_have_the_names_that_they_are_given_and_keep_those_of_earlier_runs(tmp_path):
    run(OrganVolumes(LABELS, tmp_path), [[item_of("s1/ct.nii.gz", {1: 4})]])
    names = {"s2/ct.nii.gz": "s2/ct"}
    run(OrganVolumes(LABELS, tmp_path, resume=True, names=names), [[item_of("s2/ct.nii.gz", {1: 5})]])
    assert {(row[0], row[4]) for row in rows_of(tmp_path)[1:]} == {("ct", "s1/ct.nii.gz"), ("s2/ct", "s2/ct.nii.gz")}


def sizes(**organs: float) -> list[dict]:
    return [{"label": organ, "voxels": int(ml > 0), "ml": ml} for organ, ml in organs.items()]


def test_few_organs_are_columns_and_cases_rows():
    table = volumes_table({"c1": sizes(liver=1500.04, spleen=0), "case_10": sizes(liver=9.96, spleen=210.5)})
    assert table.splitlines() == [
        "ml        liver  spleen",
        "c1       1500.0       -",
        "case_10    10.0   210.5",
        "-  not found",
    ]


def test_many_organs_of_few_cases_are_rows():
    organs = {f"organ_{number}": float(number) for number in range(9)}
    lines = volumes_table({"a": sizes(**organs), "b": sizes(**organs)}).splitlines()
    assert lines[:3] == ["ml         a    b", "organ_0    -    -", "organ_1  1.0  1.0"]
    assert lines[9:] == ["organ_8  8.0  8.0", "-  not found"]


def test_a_table_without_a_dash_explains_none():
    assert volumes_table({"c1": sizes(liver=5.0)}).splitlines() == ["ml  liver", "c1    5.0"]


def test_many_cases_are_summarised_over_those_that_have_the_organ():
    cases = {f"c{number}": sizes(liver=float(number), spleen=0) for number in range(22)}  # c0 has no liver
    assert volumes_table(cases).splitlines() == [
        "ml      median  smallest  largest  absent in",
        "liver     11.0       1.0     21.0          1",
        "spleen       -         -        -         22",
        "-  not found",
    ]


def test_the_table_is_logged_with_the_names_of_the_cases(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(OrganVolumes(LABELS, tmp_path), [[item_of("d/c2.nii.gz", {1: 400})], [item_of("d/c1.nii.gz", {2: 250})]])
    wrote, table = [one.getMessage() for one in caplog.records if one.name.startswith("bundles")]
    assert wrote == f"wrote {tmp_path}/volumes.csv (2 cases)"
    assert table.splitlines() == [
        "volumes of 2 scans:",
        "ml  liver  left kidney  never there",
        "c1      -          0.2            -",
        "c2    0.4            -            -",
        "-  not found",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "case;label;voxels;ml;image\na;liver;1;1.0;a.nii.gz\n", "case,label,voxels,ml,image\na,liver,1.5,x,a\n"],
)
def test_a_table_that_another_program_has_saved_is_named(tmp_path, text):
    file = tmp_path / "volumes.csv"
    file.write_text(text)
    if not text:
        assert read_volumes(file) == {} == read_cases(file)
        return
    for read in (read_volumes, read_cases):
        with pytest.raises(InputError, match="volumes.csv is not a table that an inference wrote"):
            read(file)
