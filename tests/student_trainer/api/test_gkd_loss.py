"""Our teacher in a loop that is not ours: the loss and its gradient against the definition in float64, and against the trainer's own."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from student_trainer.api import ConfigError, DataError, RunError, connect, gkd_loss, train
from student_trainer.losses.integrity import TeacherHeadMismatch
from teacher_wire.core.errors import LabelError, LimitError, MismatchError, NotFoundError, UnavailableError
from teacher_wire.testing.fake_teacher import FakeTeacher
from teacher_wire.testing.loopback import serve
from tests.student_trainer.conftest import run_config

V, D = 64, 16
IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [8, 1, 4, 0, 0, 0], [6, 6, 2, 30, 12, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()


@pytest.fixture(scope="module")
def fake():
    return FakeTeacher(vocab_rows=V, hidden_size=D, seed=3)


@pytest.fixture(scope="module")
def server(fake):
    with serve(fake) as running:
        yield running


@pytest.fixture
def teacher_of(server, tmp_path):
    made = []

    def make(**options):
        with pytest.warns(UserWarning, match="tokenizer"):
            made.append(connect(server.address, cache_dir=tmp_path, **options))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


def teacher_logits(fake: FakeTeacher, ids: list[int]) -> np.ndarray:
    """[L, V] in float64, by the fake's own formula."""
    batch_ids = np.asarray(ids, np.int32)
    from teacher_wire.core.batch import TokenBatch

    wanted = np.ones(len(ids), np.bool_)
    wanted[-1] = False
    batch = TokenBatch(batch_ids, np.array([0, len(ids)], np.int32), wanted)
    states = fake.states(batch)
    return states.astype(np.float64) @ fake.weight_VD.astype(np.float64).T


def definition(fake, logits_BLS, kind: str, beta: float, tau: float, kept: int | None = None) -> torch.Tensor:
    """Mean over labelled rows of the divergence as the paper writes it, in float64, with autograd's gradient."""
    rows = []
    for b in range(2):
        of_teacher = torch.from_numpy(teacher_logits(fake, IDS[b].tolist()))
        for t in range(5):
            if not MASK[b, t + 1]:
                continue
            p = (of_teacher[t] / tau).log_softmax(-1).exp()
            q = (logits_BLS[b, t, :V].double() / tau).log_softmax(-1).exp()
            if kept is not None:
                top = p.topk(kept).indices
                outside = torch.ones(V, dtype=torch.bool).index_fill(0, top, False)
                p = torch.cat([p[top], p[outside].sum()[None]])
                q = torch.cat([q[top], q[outside].sum()[None]])
            m = beta * p + (1 - beta) * q
            rows.append(
                {
                    "forward_kl": lambda p=p, q=q: (p * (p / q).log()).sum(),
                    "reverse_kl": lambda p=p, q=q: (q * (q / p).log()).sum(),
                    "jsd": lambda p=p, q=q, m=m: (
                        beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
                    ),
                }[kind]()
            )
    return torch.stack(rows).mean()


@pytest.mark.parametrize(
    ("kind", "beta", "tau", "transport"),
    [
        ("forward_kl", 0.5, 1.0, "hidden"),
        ("forward_kl", 0.5, 2.5, "hidden"),
        ("reverse_kl", 0.5, 1.0, "hidden"),
        ("jsd", 0.3, 4.0, "hidden"),
        ("forward_kl", 0.5, 1.0, "top_k"),
        ("jsd", 0.7, 1.0, "top_k"),
        ("jsd", 0.7, 1.5, "full"),
    ],
)
def test_loss_and_gradient_are_the_definition(fake, teacher_of, kind, beta, tau, transport):
    teacher = teacher_of(transport=transport, **({"k": 8} if transport == "top_k" else {}))
    logits = torch.randn(3, 6, V + 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    expected = definition(fake, logits, kind, beta, tau, 8 if transport == "top_k" else None)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    own = {"beta": beta} if kind == "jsd" else {}
    found = gkd_loss(logits, teacher.labels(IDS, MASK), divergence=kind, temperature=tau, **own)
    assert found.rows == 5
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(found.loss, logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-7)
    assert not grad[..., V:].any()  # ids that the teacher does not have
    assert not grad[2].any()  # a sequence without a supervised token


@pytest.mark.parametrize("own", [{"beta": 0.9}, {"alpha": 0.1}, {"normalization": "unit"}], ids=str)
def test_what_belongs_to_another_divergence_is_refused(teacher_of, own):
    with pytest.raises(ConfigError, match=f"{next(iter(own))} belongs to divergence .*, not forward_kl"):
        gkd_loss(torch.zeros(3, 6, V), teacher_of().labels(IDS, MASK), **own)


def test_states_and_head_give_what_logits_give(teacher_of):
    labels = teacher_of().labels(IDS, MASK)
    states = torch.randn(3, 6, 12, generator=torch.Generator().manual_seed(2), requires_grad=True)
    head = torch.nn.Linear(12, V, bias=True)
    of_states = gkd_loss(states, labels, head=head, sft_weight=0.5, temperature=2.0, tau_squared=True)
    of_logits = gkd_loss(head(states), labels, sft_weight=0.5, temperature=2.0, tau_squared=True)
    torch.testing.assert_close(of_states.loss, of_logits.loss)
    assert of_states.ce.item() == pytest.approx(of_logits.ce.item(), rel=1e-5)
    mine = torch.autograd.grad(of_states.loss, [states, head.weight, head.bias])
    theirs = torch.autograd.grad(of_logits.loss, [states, head.weight, head.bias])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing_and_the_normalizer_divides(teacher_of):
    labels = teacher_of().labels(IDS, MASK)
    logits = torch.randn(3, 6, V, generator=torch.Generator().manual_seed(4), requires_grad=True)
    whole = gkd_loss(logits, labels, sft_weight=0.5)
    divided = gkd_loss(logits, labels, sft_weight=0.5, normalizer=torch.tensor(10))
    torch.testing.assert_close(divided.loss * 2, whole.loss)
    assert divided.kd == whole.kd


def test_labels_are_kept_and_asked_once(fake, server, teacher_of):
    before = fake.calls
    teacher_of().labels(IDS, MASK)
    again = teacher_of()
    again.labels(IDS.tolist(), MASK.int().tolist())
    assert fake.calls == before + 1
    assert again.usage.disk_sequences == 2


def test_asynchronous_and_ahead(fake, teacher_of):
    teacher = teacher_of(keep_labels=False)

    async def several():
        return await asyncio.gather(*(teacher.labels_async(IDS, MASK) for _ in range(3)))

    assert [len(labels) for labels in asyncio.run(several())] == [5, 5, 5]
    read = []

    def batches():
        for number in range(9):
            read.append(number)
            yield {"input_ids": (IDS + number) % V, "labels": torch.where(MASK, IDS, -100), "number": number}

    coming = teacher.ahead(batches(), depth=3)
    first, labels = next(coming)
    assert (first["number"], len(labels)) == (0, 5)
    assert len(read) <= 4  # bounded
    assert [batch["number"] for batch, _ in coming] == list(range(1, 9))
    tight = teacher.ahead(batches(), depth=9, max_mb=1e-6)
    read.clear()
    next(tight)
    assert len(read) == 2  # one asked about, one read and too large to go with it
    tight.close()


def test_what_a_user_can_get_wrong_is_named(fake, server, teacher_of, tmp_path):
    teacher = teacher_of()
    labels, logits = teacher.labels(IDS, MASK), torch.zeros(3, 6, V)
    with pytest.raises(DataError, match=r"\[3, 6\]"):
        teacher.labels(IDS, MASK[:, :5])
    with pytest.raises(DataError, match="no token of the batch"):
        teacher.labels(IDS, torch.zeros_like(MASK))
    with pytest.raises(DataError, match="the first token of sequence 0 is supervised"):
        teacher.labels(IDS, torch.ones_like(MASK))
    with pytest.raises(DataError, match="labels != -100"):
        teacher.labels(IDS, torch.where(MASK, IDS, -100))
    with pytest.raises(DataError, match=r"\[B, L, ...\]"):
        gkd_loss(logits[:, :4], labels)
    with pytest.raises(DataError, match="vocab_rows=60 to connect"):
        gkd_loss(logits[..., :60], labels)
    with pytest.raises(ConfigError, match="divergence"):
        gkd_loss(logits, labels, divergence="forward-kl")
    with pytest.raises(ConfigError, match="on_policy"):
        gkd_loss(logits, labels, divergence="pg_rkl")
    with pytest.raises(ConfigError, match="temperature 2"):
        gkd_loss(logits, teacher_of(transport="top_k", k=4).labels(IDS, MASK), temperature=2.0)
    with pytest.raises(ConfigError, match=r"nn\.Linear"):
        gkd_loss(torch.zeros(3, 6, 12), labels, head="lm_head")
    with pytest.raises(LimitError):
        teacher.labels(torch.ones(1, 5000, dtype=torch.long), torch.arange(5000)[None] > 0)
    with pytest.raises(ConfigError, match="depth"):
        teacher.ahead([], depth=0)
    with pytest.raises(DataError, match="masks="):
        list(teacher.ahead([{"ids": IDS}]))
    teacher.close()
    with pytest.raises(RunError, match="connect again"):
        teacher.labels(IDS, MASK)
    with pytest.raises(NotFoundError, match="fake"), pytest.warns(UserWarning, match="tokenizer"):
        connect(server.address, name="another", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="k=65"), pytest.warns(UserWarning, match="tokenizer"):
        connect(server.address, transport="top_k", k=65, cache_dir=tmp_path)
    with pytest.raises(UnavailableError), pytest.warns(UserWarning, match="tokenizer"):
        connect("127.0.0.1:9", wait_s=0, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="transport must be hidden, top_k or full"):
        connect(server.address, transport="hiden", cache_dir=tmp_path)


def test_another_tokenizer_is_refused(server, model_factory, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_factory("qwen2"))
    with pytest.raises(MismatchError, match="another tokenizer"):
        connect(server.address, tokenizer=tokenizer, cache_dir=tmp_path)


@pytest.mark.parametrize("mistake", ["state", "foreign", "shifted", "nan"])
def test_wrong_labels_never_become_a_loss(mistake, tmp_path):
    with serve(FakeTeacher(vocab_rows=V, hidden_size=D, mistake=mistake)) as running:
        with pytest.warns(UserWarning, match="tokenizer"):
            teacher = connect(running.address, cache_dir=tmp_path, retry_s=0, check="all")
        with teacher, pytest.raises(LabelError) as caught:
            gkd_loss(torch.zeros(3, 6, V), teacher.labels(IDS, MASK))
        if isinstance(caught.value, TeacherHeadMismatch):
            assert "sequence" in caught.value.__notes__[0]
            assert "deleted" in caught.value.__notes__[1]
            assert not list((tmp_path / "labels").rglob("*.labels"))


def test_a_plain_loop_computes_what_a_run_computes(tmp_path, model_factory, rows_file):
    """The first step of `train` and of a loop over the API: the same loss for the same batch."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from student_trainer.config.run import parse_config
    from student_trainer.data.inputs import load_run_data, order_of
    from tests.student_trainer.conftest import fake_for

    model_folder = model_factory("qwen2")
    with serve(fake_for(model_folder)) as running:
        tree = run_config(
            tmp_path, model_folder, rows_file, running.address,
            model={"lora": None, "dtype": "float32"}, train={"max_steps": 2, "accumulation": 1},
            loss={"output": {"divergence": "jsd", "beta": 0.3, "temperature": 2.0}, "sft_weight": 0.5},
        )  # fmt: skip
        result = train(tree, {"train.batch_size": 4, "train.save_steps": 0, "train.eval_steps": 0})
        config = parse_config(tree, "test").model_copy()
        config = replace_batch(config, 4)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        data, _ = load_run_data(config, tokenizer, Console(quiet=True), None)
        examples = [data[row].example for row in order_of(config, data).batch(0)]
        length = max(example.token_ids.size for example in examples)
        ids, mask = np.zeros((4, length), np.int64), np.zeros((4, length), np.bool_)
        for b, example in enumerate(examples):
            ids[b, : example.token_ids.size], mask[b, : example.token_ids.size] = example.token_ids, example.loss_mask
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        with connect(running.address, tokenizer=tokenizer, cache_dir=tmp_path / "cache") as teacher:
            labels = teacher.labels(ids, mask)
            found = gkd_loss(
                model(torch.from_numpy(ids)).logits, labels, divergence="jsd", beta=0.3, temperature=2.0, sft_weight=0.5
            )
            assert teacher.usage.teacher_sequences == 0  # the run has kept them
    logged = result.curve[0]
    assert found.loss.item() == pytest.approx(logged["loss"], rel=1e-4)
    found.loss.backward()
    norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(logged["grad_norm"], rel=1e-3)


def replace_batch(config, size):
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size})})


def test_train_takes_plain_data_and_refuses_what_it_does_not_know(tmp_path, model_factory, rows_file):
    tree = run_config(tmp_path, model_factory("qwen2"), rows_file, "127.0.0.1:9")
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        train(tree, {"train.learning_rat": 1e-5})
    assert "learning_rat" not in tree["train"]
    with pytest.raises(ConfigError, match="max_steps"):
        train(tree, ["train.max_steps=0.5"])
    with pytest.raises(ConfigError, match="No such file"):
        train(tmp_path / "none.yaml")
