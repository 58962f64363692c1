"""Families of tasks: what they hold, that they are functions of (seed, index), and what a user trips over."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import metanudge as mn
from metanudge.checks import not_finite
from metanudge.permutations import permuted
from metanudge.tasks.few_shot import labels_of
from metanudge.tasks.mnist1d import CLASSES, signals

FAMILIES = {
    "sinusoid": mn.tasks.sinusoid,
    "harmonic": mn.tasks.harmonic,
    "linear": mn.tasks.linear,
    "logistic": mn.tasks.logistic,
}


def labelled(classes: int = 8, each: int = 12) -> TensorDataset:
    """The input tells class and example."""
    kinds = torch.arange(classes * each) % classes
    return TensorDataset(torch.stack([kinds, torch.arange(classes * each)], dim=1).float(), kinds)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_is_a_function_of_seed_and_index(name):
    family = FAMILIES[name]
    whole = family(6, shots=3, queries=4, seed=5)
    assert whole.support.inputs.shape[:2] == (6, 3)
    assert whole.query.targets.shape[:2] == (6, 4)
    part = family(2, shots=3, queries=4, seed=5, first=3)
    torch.testing.assert_close(part.query.inputs, whole.query.inputs[3:5], rtol=0, atol=0)
    torch.testing.assert_close(part.support.targets, whole.support.targets[3:5], rtol=0, atol=0)
    assert not torch.equal(family(6, shots=3, queries=4, seed=6).support.inputs, whole.support.inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_settings_of_a_family_are_told(name):
    for setting in ({"number": 0}, {"number": 2, "shots": 0}, {"number": 2, "queries": 1.5}):
        with pytest.raises(mn.SettingsError, match="whole number"):
            FAMILIES[name](**setting)


def test_harmonic_has_two_frequencies_of_ratio_two():
    """Nine unknowns at most: with ω known, the targets are linear in four sines and cosines."""
    tasks = mn.tasks.harmonic(4, shots=30, queries=30, dtype=torch.float64)
    for x, y in zip(tasks.support.inputs, tasks.support.targets, strict=True):
        best = float("inf")
        for frequency in np.linspace(5, 7, 4001):
            waves = torch.cat([f(m * frequency * x) for m in (1, 2) for f in (torch.sin, torch.cos)], dim=1)
            left = y - waves @ torch.linalg.lstsq(waves, y).solution
            best = min(best, float(left.norm() / y.norm()))
        assert best < 0.01  # of a frequency grid of 5e-4
    inputs = mn.tasks.harmonic(3000, shots=20).support.inputs
    assert abs(float(inputs.std(1).square().mean()) - 1) < 0.05
    assert abs(float(inputs.mean(1).square().mean()) - (64 / 12 + 1 / 20)) < 0.3
    with pytest.raises(mn.SettingsError, match="noise"):
        mn.tasks.harmonic(1, noise=-1.0)


def test_noise_is_added_to_the_same_harmonic():
    clean, noisy = (mn.tasks.harmonic(200, noise=noise, dtype=torch.float64) for noise in (0.0, 0.5))
    torch.testing.assert_close(clean.support.inputs, noisy.support.inputs, rtol=0, atol=0)
    assert abs(float((noisy.support.targets - clean.support.targets).std()) - 0.5) < 0.03


def test_linear_closed_forms_are_stationary_and_the_derivative_of_the_objective():
    tasks, prox = mn.tasks.linear(3, features=4, shots=6, queries=5), 0.7
    theta = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    phi = mn.tasks.linear_solutions(tasks.support, theta.detach(), prox).requires_grad_()
    x, y = tasks.support
    energy = (
        (x @ phi.unsqueeze(-1) - y).square().mean((1, 2)) + prox / 2 * (phi - theta.detach()).square().sum(1)
    ).sum()
    assert float(torch.autograd.grad(energy, phi)[0].norm()) < 1e-12
    objective = torch.stack(
        [
            (xq @ solved - yq[:, 0]).square().mean()
            for solved, xq, yq in zip(mn.tasks.linear_solutions(tasks.support, theta, prox), *tasks.query, strict=True)
        ]
    ).mean()
    (exact,) = torch.autograd.grad(objective, theta)
    torch.testing.assert_close(mn.tasks.linear_meta_gradient(tasks, theta.detach(), prox), exact)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(theta)
    mn.MetaLearner(model, mn.metrics.squared_error, prox=prox, solver=mn.Nesterov(200)).backward(tasks)
    torch.testing.assert_close(model.weight.grad[0], exact, rtol=1e-7, atol=1e-9)


# Episodes.


def test_episodes_of_a_family_are_its_tasks():
    tasks = mn.tasks.episodes(mn.tasks.sinusoid, number=9, shots=3, seed=2)
    stack = mn.tasks.sinusoid(9, shots=3, seed=2)
    assert len(tasks) == len(list(tasks)) == 9
    torch.testing.assert_close(tasks[4].support.inputs, stack.support.inputs[4], rtol=0, atol=0)
    torch.testing.assert_close(tasks[-1].query.targets, stack.query.targets[8], rtol=0, atol=0)
    with pytest.raises(IndexError, match="no task 9"):
        tasks[9]
    with pytest.raises(TypeError, match="no end"):
        len(mn.tasks.episodes(mn.tasks.sinusoid))
    with pytest.raises(mn.SettingsError, match="sinusoid does not take these settings"):
        mn.tasks.episodes(mn.tasks.sinusoid, shoots=3)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_tasks_that_one_process_draws(workers):
    tasks = mn.tasks.few_shot(labelled(), ways=3, shots=2, queries=2, number=12, seed=4)
    alone = list(DataLoader(tasks, batch_size=5, collate_fn=mn.tasks.collate))
    shared = list(DataLoader(tasks, batch_size=5, collate_fn=mn.tasks.collate, num_workers=workers))
    assert len(alone) == len(shared) == 3
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.support.inputs, b.support.inputs)
        assert torch.equal(a.query.targets, b.query.targets)


def test_episodes_can_be_pickled():
    tasks = mn.tasks.few_shot(labelled(), ways=3, shots=2, queries=2)
    again = pickle.loads(pickle.dumps(tasks))
    assert torch.equal(again[3].support.inputs, tasks[3].support.inputs)


def test_collate_stacks_what_fits_and_lists_what_does_not():
    ragged = mn.tasks.few_shot(labelled(), ways=(2, 5), shots=(1, 3), queries=2, number=30)
    batch = mn.tasks.collate([ragged[i] for i in range(30)])
    assert isinstance(batch, list)
    assert {len(task.query.targets) // 2 for task in batch} == {2, 3, 4, 5}
    assert {len(task.support.targets) // int(task.support.targets.max() + 1) for task in batch} == {1, 2, 3}
    model = nn.Linear(2, 5)
    step = mn.MetaLearner(model, lambda m, b: nn.functional.cross_entropy(m(b.inputs), b.targets)).backward(batch)
    assert step.dropped_tasks == 0
    with pytest.raises(mn.TasksError, match="no tasks"):
        mn.tasks.collate([])


def test_collate_lists_tasks_of_minibatches():
    batch = mn.Batch(torch.randn(4, 2), torch.randn(4, 1))
    task = mn.Tasks(mn.Minibatches([batch, batch]), batch)
    loader = DataLoader([task, task], batch_size=2, collate_fn=mn.tasks.collate)
    (found,) = loader
    assert isinstance(found, list)
    learner = mn.MetaLearner(
        nn.Linear(2, 1), mn.metrics.squared_error, solver=mn.GradientDescent(2, lr=0.1), execution="in_place"
    )
    assert learner.backward(found).dropped_tasks == 0


# Few-shot.


def test_support_and_query_are_disjoint_and_labels_are_permuted():
    tasks = mn.tasks.few_shot(labelled(), ways=4, shots=3, queries=5, seed=1)
    named = set()
    for index in range(40):
        support, query = tasks[index]
        assert support.targets.tolist() == [label for label in range(4) for _ in range(3)]
        assert query.targets.tolist() == [label for label in range(4) for _ in range(5)]
        examples = torch.cat([support.inputs[:, 1], query.inputs[:, 1]])
        assert len(examples.unique()) == 4 * 8
        for label in range(4):
            kinds = torch.cat([support.inputs[support.targets == label, 0], query.inputs[query.targets == label, 0]])
            assert len(kinds.unique()) == 1
            named.add((label, int(kinds[0])))
    assert len(named) == 4 * 8  # every class has had every name


def test_few_shot_says_what_it_can_not_draw():
    with pytest.raises(mn.SettingsError, match="need as many classes, but there are 8"):
        mn.tasks.few_shot(labelled(), ways=9, shots=1, queries=1)
    with pytest.raises(mn.SettingsError, match="13 examples of every class, but class 0 has 12"):
        mn.tasks.few_shot(labelled(), ways=2, shots=(1, 5), queries=8)
    with pytest.raises(mn.SettingsError, match="no examples of class 8"):
        mn.tasks.few_shot(labelled(), ways=2, shots=1, queries=1, classes=[1, 8])
    with pytest.raises(mn.SettingsError, match="least, most"):
        mn.tasks.few_shot(labelled(), ways=(4, 2), shots=1, queries=1)
    with pytest.raises(mn.SettingsError, match="map-style"):
        mn.tasks.few_shot(iter([]), ways=2, shots=1, queries=1)
    with pytest.raises(mn.SettingsError, match="whole number for each"):
        mn.tasks.few_shot(TensorDataset(torch.randn(4, 2), torch.randn(4)), ways=2, shots=1, queries=1)


class Listed(Dataset):
    """Without an attribute that holds the classes; inputs that are no tensors."""

    def __init__(self, tensors: bool = True) -> None:
        self.tensors = tensors

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return (torch.tensor([float(index)]) if self.tensors else index), index % 2


def test_classes_are_read_from_what_there_is():
    assert labels_of(Listed()).tolist() == [0, 1] * 5
    assert labels_of(Subset(labelled(), [3, 9, 4])).tolist() == [3, 1, 4]
    only = mn.tasks.few_shot(Subset(labelled(), range(40)), ways=2, shots=1, queries=1, classes=[2, 5])
    assert {int(kind) for index in range(20) for kind in only[index].support.inputs[:, 0]} == {2, 5}
    with pytest.raises(mn.TasksError, match="input is int"):
        mn.tasks.few_shot(Listed(tensors=False), ways=2, shots=1, queries=1)[0]


# MNIST-1D.


def test_mnist1d_is_the_package_s_data_set():
    data = pytest.importorskip("mnist1d.data")
    made = data.make_dataset(data.get_dataset_args())
    inputs, digits = signals()
    np.testing.assert_allclose(inputs[:4000, 0].numpy(), made["x"].astype(np.float32))
    np.testing.assert_array_equal(digits[4000:].numpy(), made["y_test"])


def drawn_from(tasks: mn.tasks.Episodes, number: int = 60) -> set[int]:
    """Rows of the data set that tasks hold."""
    rows = {tuple(row): place for place, row in enumerate(signals()[0][:, 0, :4].tolist())}
    return {rows[tuple(x[0, :4].tolist())] for task in tasks.take(number) for batch in task for x in batch.inputs}


def test_permuted_labels_keep_the_splits_apart():
    found = {split: drawn_from(mn.tasks.mnist1d("permuted_labels", split)) for split in CLASSES}
    assert max(found["train"]) < 3200 <= min(found["validation"])
    assert max(found["validation"]) < 4000 <= min(found["test"])
    digits = signals()[1]
    assert {int(digits[place]) for place in found["test"]} == set(range(10))
    assert mn.tasks.mnist1d()[0].support.inputs.shape == (25, 1, 40)


def test_new_classes_are_new():
    digits = signals()[1]
    for split, classes in CLASSES.items():
        found = drawn_from(mn.tasks.mnist1d("new_classes", split))
        assert {int(digits[place]) for place in found} == set(classes)
    with pytest.raises(mn.SettingsError, match="protocol"):
        mn.tasks.mnist1d("new")
    with pytest.raises(mn.SettingsError, match="split"):
        mn.tasks.mnist1d(split="dev")


# Images on disk.


def picture(path, seed, size=(12, 10), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8), mode).save(path)


@pytest.fixture
def omniglot(tmp_path):
    number = 0
    for part, alphabets in (("images_background", ("Greek", "Korean")), ("images_evaluation", ("Tengwar",))):
        for alphabet in alphabets:
            for character in range(1, 5):
                for drawer in range(1, 4):
                    number += 1
                    name = f"{number:04d}_{drawer:02d}.png"
                    picture(tmp_path / part / alphabet / f"character{character:02d}" / name, number)
    return tmp_path


def test_omniglot_is_split_by_characters(omniglot):
    splits = {
        split: mn.tasks.image_folders(omniglot, split, counts=(7, 2)) for split in ("train", "validation", "test")
    }
    assert [len(data.classes) for data in splits.values()] == [7, 2, 3]
    names = [name for data in splits.values() for name in data.classes]
    assert len(set(names)) == 12
    assert "Tengwar/character02" in names
    both = mn.tasks.image_folders(omniglot, "train+validation", counts=(7, 2))
    assert both.classes == splits["train"].classes + splits["validation"].classes
    image, kind = splits["train"][4]
    assert image.shape == (1, 28, 28)
    assert kind == 1
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    again = mn.tasks.image_folders(omniglot, "train", counts=(7, 2))
    assert again.paths == splits["train"].paths
    other = mn.tasks.image_folders(omniglot, "train", counts=(7, 2), seed=1)
    assert set(other.classes) != set(again.classes)
    with pytest.raises(mn.SettingsError, match="12 characters, too few"):
        mn.tasks.image_folders(omniglot)


def test_rotations_are_new_classes(omniglot):
    plain, turned = (mn.tasks.image_folders(omniglot, counts=(7, 2), rotations=turn) for turn in (False, True))
    assert len(turned) == 4 * len(plain)
    assert len(turned.classes) == 4 * len(plain.classes)
    for quarter in range(4):
        image, kind = turned[quarter * len(plain) + 5]
        assert torch.equal(image, torch.rot90(plain[5][0], quarter, (1, 2)))
        assert kind == plain[5][1] + 7 * quarter
    task = mn.tasks.few_shot(turned, ways=20, shots=1, queries=2)[0]
    assert task.query.inputs.shape == (40, 1, 28, 28)


def test_folders_of_one_class_in_two_splits_go_together(tmp_path):
    for part, number in (("train", 3), ("val", 2)):
        for index in range(number):
            picture(tmp_path / part / "n_a" / f"{part}{index}.jpg", index, mode="RGB")
    both = mn.tasks.image_folders(tmp_path, "train+validation", size=8)
    assert len(both) == 5
    gray = mn.tasks.image_folders(tmp_path, "train+validation", size=8, gray=True)
    assert (both[0][0].shape, gray[0][0].shape) == ((3, 8, 8), (1, 8, 8))
    with pytest.raises(mn.SettingsError, match="gray must be True or False"):
        mn.tasks.image_folders(tmp_path, "train+validation", gray=1)


def test_permutations_leave_labels_that_name_no_class():
    labels = torch.tensor([[0, 1, 2, -100], [-100, 2, 0, 1]])
    batch = mn.Batch(torch.zeros(2, 4, 1), labels)
    for one in permuted(mn.Tasks(batch, batch), 6, 0):
        for targets in (one.support.targets, one.query.targets):
            assert torch.equal(targets == -100, labels == -100)
            assert targets.sort(-1).values.tolist() == [[-100, 0, 1, 2]] * 2
    assert torch.equal(labels, torch.tensor([[0, 1, 2, -100], [-100, 2, 0, 1]]))
    signs = mn.Batch(torch.zeros(1, 4, 1), torch.tensor([[-1, 1, -1, 1]]))
    assert len({str(one.query.targets) for one in permuted(mn.Tasks(signs, signs), 6, 0)}) == 2


def test_mini_imagenet_is_split_by_its_tables(tmp_path):
    number = 0
    for name, kinds in (("train", "abc"), ("val", "d"), ("test", "ef")):
        lines = ["filename,label"]
        for kind in kinds:
            for _ in range(2):
                number += 1
                picture(tmp_path / "images" / f"n{number:017d}.jpg", number, mode="RGB")
                lines.append(f"n{number:017d}.jpg,n_{kind}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    train, test = (mn.tasks.image_folders(tmp_path, split) for split in ("train", "test"))
    assert train.classes == ["n_a", "n_b", "n_c"]
    assert test.targets == [0, 0, 1, 1]
    assert test[3][0].shape == (3, 84, 84)
    assert mn.tasks.image_folders(tmp_path, "train+validation", size=20)[7][0].shape == (3, 20, 20)
    (tmp_path / "images" / "n00000000000000001.jpg").unlink()
    with pytest.raises(mn.SettingsError, match="there is no"):
        mn.tasks.image_folders(tmp_path, "train")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(mn.SettingsError, match=r"there is no .*val.csv"):
        mn.tasks.image_folders(tmp_path, "validation")


def test_class_folders(tmp_path):
    for place, name in enumerate(("train/cat/1.png", "train/cat/2.JPG", "train/dog/1.png", "val/emu/1.png")):
        picture(tmp_path / name, place, mode="RGB")
    (tmp_path / "train" / "notes").mkdir()
    data = mn.tasks.image_folders(tmp_path, "train")
    assert (data.classes, data.targets) == (["cat", "dog"], [0, 0, 1])
    assert data[0][0].shape == (3, 10, 12)
    assert mn.tasks.image_folders(tmp_path, "validation").classes == ["emu"]
    with pytest.raises(mn.SettingsError, match=r"no images in .*\n +Omniglot(.|\n)*mini-ImageNet"):
        mn.tasks.image_folders(tmp_path, "test")
    with pytest.raises(mn.SettingsError, match="split must be"):
        mn.tasks.image_folders(tmp_path, "dev")


@pytest.mark.parametrize("family", [mn.tasks.linear, mn.tasks.logistic])
@pytest.mark.parametrize("wrong", [{"scales": 0.0}, {"anisotropy": -1.0}])
def test_scales_are_positive(family, wrong):
    with pytest.raises(mn.SettingsError, match="above 0"):
        family(1, **wrong)


def sized(supports: list[int], queries: list[int], *, targets: str = "classes", seed: int = 0) -> list[mn.Tasks]:
    """Single tasks of so many examples, with two inputs, in float64."""
    draw = torch.Generator().manual_seed(seed)

    def examples(number: int) -> mn.Batch:
        x = torch.randn(number, 2, generator=draw, dtype=torch.float64)
        y = torch.randint(3, (number,), generator=draw) if targets == "classes" else x.sin() @ torch.ones(2, 1).double()
        return mn.Batch({"x": x, "scale": torch.ones(number, 1).double()}, y)

    return [mn.Tasks(examples(n), examples(m)) for n, m in zip(supports, queries, strict=True)]


class Scaled(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double()

    def forward(self, x, scale):
        return self.layers(x * scale)


@pytest.mark.parametrize(
    "settings", [{"execution": "vectorized"}, {"execution": "in_place"}, {"microbatch": 1}, {"microbatch": 4}], ids=str
)
@pytest.mark.parametrize(("targets", "loss"), [("classes", "cross_entropy"), ("numbers", "squared_error")])
def test_a_padded_stack_gives_what_the_list_gives(targets, loss, settings):
    torch.manual_seed(0)
    tasks = sized([3, 7, 1, 7], [5, 2, 9, 4], targets=targets)
    model, metric = Scaled(3 if targets == "classes" else 1), getattr(mn.metrics, loss)
    learner = mn.MetaLearner(model, metric, prox=2.0, estimator=mn.FOBMAML(nu=0.01), **settings)
    found = []
    stack = mn.tasks.pad(tasks)
    for given in (tasks, stack, stack.unstack()):
        model.zero_grad()
        step = learner.backward(given)
        scores = learner.evaluate(given, mn.metrics.accuracy if targets == "classes" else None)
        found.append([step.query_loss, step.query_losses, scores.values, *(p.grad for p in model.parameters())])
    assert float(found[0][-1].norm()) > 0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-11)
    assert stack.support.inputs["x"].shape == (4, 7, 2)
    assert stack.query.targets.shape[:2] == (4, 9)
    counts = stack.query.targets.isnan() if targets == "numbers" else stack.query.targets == -100
    assert (~counts).reshape(4, 9).sum(1).tolist() == [5, 2, 9, 4]
    assert set(stack.support.inputs["x"][2].flatten().tolist()) == set(tasks[2].support.inputs["x"].flatten().tolist())


def test_padding_leaves_the_tasks_and_the_loader_collates_by_it():
    tasks = sized([2, 4], [4, 3], targets="numbers")
    before = [task.query.targets.clone() for task in tasks]
    (stack,) = DataLoader(tasks, batch_size=2, collate_fn=mn.tasks.pad)
    assert stack.support.targets.shape == (2, 4, 1)
    for task, targets in zip(tasks, before, strict=True):
        torch.testing.assert_close(task.query.targets, targets, rtol=0, atol=0)
    same = sized([3, 3], [2, 2])
    torch.testing.assert_close(mn.tasks.pad(same), mn.tasks.collate(same), rtol=0, atol=0)


def test_a_mask_beside_the_targets_is_padded_by_false():
    def batch(number: int) -> mn.Batch:
        return mn.Batch(torch.ones(number, 2), (torch.arange(number), torch.ones(number, dtype=torch.bool)))

    stack = mn.tasks.pad([mn.Tasks(batch(n), batch(n)) for n in (1, 3)])
    assert stack.query.targets[0].tolist() == [[0, -100, -100], [0, 1, 2]]
    assert stack.query.targets[1].tolist() == [[True, False, False], [True, True, True]]


def test_a_mean_over_few_half_precision_targets_is_one():
    """3 of 100,000: shares would be rounded to nothing."""
    targets = torch.full((100_000,), float("nan")).half()
    targets[:3] = 0.0625
    found = mn.metrics.squared_error(nn.Identity(), mn.Batch(torch.zeros_like(targets), targets))
    assert float(found) == 0.0625**2


def test_a_prediction_that_is_nan_is_not_taken_for_padding():
    batch = mn.Batch(torch.tensor([[1.0], [float("nan")]]), torch.tensor([[3.0], [1.0]]))
    assert mn.metrics.squared_error(nn.Identity(), batch).isnan()
    missing = mn.Batch(torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0], [float("nan")]]))
    assert float(mn.metrics.squared_error(nn.Identity(), missing)) == 4.0
    with pytest.raises(mn.LossError, match=r"targets\.float\(\)"):
        mn.metrics.squared_error(nn.Identity(), mn.Batch(torch.ones(2), torch.ones(2).long()))


def _wider(tasks):
    return [tasks[0], mn.Tasks(mn.Batch(torch.randn(5, 9).double(), tasks[1].support.targets), tasks[1].query)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tasks: [], "no tasks"),
        (lambda tasks: mn.tasks.collate(tasks[:1]), "have one size"),
        (lambda tasks: list(mn.tasks.collate(tasks[:1])), "found Batch"),
        (iter, "list_iterator"),
        (lambda tasks: mn.tasks.Episodes(lambda index: tasks[index]), r"got Episodes; give \.take\(n\)"),
        (_wider, "task 1 .* differs from task 0"),
        (lambda tasks: [tasks[0], mn.Tasks(mn.Minibatches([tasks[1].support]), tasks[1].query)], "Minibatches"),
        (lambda tasks: [mn.Tasks(mn.Batch(one.support.inputs, ()), one.query) for one in tasks], "there are none"),
        (
            lambda tasks: [mn.Tasks(one.support._replace(targets=one.support.targets > 0), one.query) for one in tasks],
            r"torch\.bool",
        ),
        (
            lambda tasks: [
                mn.Tasks(one.support._replace(targets=one.support.targets.byte()), one.query) for one in tasks
            ],
            r"torch\.uint8.*\.long\(\)",
        ),
        (
            lambda tasks: [mn.Tasks(mn.Batch(one.support.inputs, torch.tensor(1.0)), one.query) for one in tasks],
            "axis of its examples, but the support of task 0",
        ),
        (lambda tasks: [tasks[0], mn.Tasks(tasks[1].support, mn.Batch(torch.ones(0, 2), torch.ones(0)))], "is empty"),
    ],
)
def test_what_can_not_be_padded_is_told(change, told):
    with pytest.raises(mn.TasksError, match=told):
        mn.tasks.pad(change(sized([3, 5], [2, 2])))


def test_padding_takes_no_blame_for_a_task_that_diverges():
    tasks = sized([3, 6], [5, 2], targets="numbers")
    tasks[1].support.inputs["x"].mul_(1e3)
    learner = mn.MetaLearner(Scaled(1), mn.metrics.squared_error, solver=mn.GradientDescent(steps=50, lr=10.0))
    for leaf in learner.model.parameters():
        nn.init.constant_(leaf, 0.3)
    stack = mn.tasks.pad(tasks)
    with pytest.raises(mn.NonFiniteError, match="smaller steps"):
        learner.backward(stack)
    stack.support.targets[0] = float("nan")
    with pytest.raises(mn.NonFiniteError, match=r"1 of 2 tasks hold NaN .* \(task 0: support targets"):
        learner.backward(stack)
    own = mn.MetaLearner(Scaled(1), lambda m, b: (m(**b.inputs) - b.targets).square().mean())
    with pytest.raises(mn.NonFiniteError, match=r"support targets.*targets of NaN, missing or padding"):
        own.backward(mn.tasks.pad(sized([3, 6], [5, 2], targets="numbers")))


def test_padding_is_data_that_may_be_missing():
    padded = mn.tasks.pad(sized([3, 7], [5, 2], targets="numbers"))
    assert not_finite([padded], [0, 1]) == {0: ["support targets"], 1: ["query targets"]}
    assert not_finite([padded], [0, 1], missing=False) == {}  # as mn.check reads it
    padded.query.targets[1] = float("nan")
    padded.support.targets[0, 0] = float("inf")
    assert not_finite([padded], [0, 1], missing=False) == {0: ["support targets"], 1: ["query targets"]}


def test_padded_tasks_are_trained_on_and_scored_under_permutations():
    torch.manual_seed(0)
    classes = sized([3, 7, 2, 5], [5, 2, 4, 4])
    learner = mn.MetaLearner(Scaled(3), mn.metrics.cross_entropy, prox=2.0)
    optimizer = mn.optim.NormalizedSGD(learner.model.parameters(), lr=0.05)
    mn.fit(learner, optimizer, mn.tasks.pad(classes), steps=2, tasks_per_step=4, progress=False)
    found = learner.evaluate(mn.tasks.pad(classes), mn.metrics.accuracy, permutations=3)
    expected = learner.evaluate(classes, mn.metrics.accuracy, permutations=3)
    torch.testing.assert_close(found.values, expected.values)
