from tests.helpers.tool_runs import Command


def test_demo_runs_once_and_holds_its_floors(command: Command, demo_data, tmp_path):
    work_dir = tmp_path / "run"
    arguments = ("--task", "cls", "--data", demo_data, "--work-dir", work_dir)
    output = command("../demo/train_on_digits.py", *arguments, "--iters", 2)
    for step in (
        "1/5 Data",
        "2/5 Training",
        "3/5 Evaluation",
        "4/5 Pictures",
        "5/5 Explorer",
        "top-1: ",
        "Time: ",
        "Picture: ",
        "Trees: ",
    ):
        assert step in output
    picture = work_dir / "predictions.png"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    assert (work_dir / "trees.png").stat().st_size > 10_000
    assert (work_dir / "explorer.html").stat().st_size > 50_000

    # A full run that finds its last checkpoint only has to evaluate it; this one knows next to nothing.
    (work_dir / "iter_2.pth").rename(work_dir / "iter_600.pth")
    output = command("../demo/train_on_digits.py", *arguments, status=1)
    assert f"2/5 Training: {work_dir / 'iter_600.pth'} is there." in output
    assert "Iter(train)" not in output
    assert picture.is_file()
    assert "error: the demo missed its floor: top-1" in output
