"""The order of a run: every example once an epoch, whole windows, and nothing that depends on what was read before."""

from hypothesis import given
from hypothesis import strategies as st

from student_trainer.data.batch_plan import RunOrder


def order(n, batch_size=2, accumulation=2, epochs=1.0, max_steps=None, seed=0):
    return RunOrder(n, batch_size=batch_size, accumulation=accumulation, epochs=epochs, max_steps=max_steps, seed=seed)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_an_epoch_holds_every_example_once(n, batch_size, accumulation, epochs):
    run = order(n, batch_size, accumulation, epochs)
    positions = [run[p] for p in range(len(run))]
    for epoch in range(epochs):
        assert sorted(positions[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(positions) == run.steps * accumulation * batch_size >= epochs * n


@given(st.integers(1, 30), st.integers(0, 200))
def test_a_batch_is_the_same_whatever_was_asked_before(n, number):
    run = order(n, max_steps=200)
    late = order(n, max_steps=200)
    for earlier in range(number):
        run.batch(earlier)
    assert run.batch(number) == late.batch(number)


def test_seeds_and_epochs_differ():
    runs = [[order(100, epochs=2, seed=s)[p] for p in range(200)] for s in (0, 1)]
    assert runs[0] != runs[1]
    assert runs[0][:100] != runs[0][100:]


def test_passes_over_the_data_are_counted():
    assert order(7, max_steps=5).epoch_at(7) == 4.0
