"""When freed memory is given back: only what is spare, and no faster than at the promised rate."""

from teacher_server.edge.memory import GIVEN_BYTES_PER_S, SPARE_BYTES, USELESS_S, Trimmer

BASE = 100 << 20


class Process:
    """Resident memory of which `free` bytes can be given back."""

    def __init__(self):
        self.used, self.free, self.held, self.trims = BASE, 0, 0, 0
        self.trimmer = Trimmer(lambda: self.held, lambda: self.used + self.free, self._trim)

    def _trim(self):
        self.trims += 1
        self.free = 0


async def test_little_is_kept_for_the_next_request():
    process = Process()
    process.free = SPARE_BYTES - 1
    assert not await process.trimmer.check(0.0)
    process.free = SPARE_BYTES
    assert await process.trimmer.check(1.0)
    assert process.free == 0


async def test_what_is_held_on_purpose_is_not_spare():
    process = Process()
    process.used += 4 * SPARE_BYTES
    process.held = 4 * SPARE_BYTES
    assert not await process.trimmer.check(0.0)


async def test_large_replies_one_after_another_are_trimmed_no_faster_than_promised():
    process, size, until_s = Process(), 200 << 20, 120
    for second in range(until_s):
        process.free = size  # freed once more by the request of this second
        await process.trimmer.check(float(second))
    assert 2 <= process.trims <= 1 + until_s * GIVEN_BYTES_PER_S / size
    process.free = size
    assert await process.trimmer.check(until_s + 60.0)  # and once it is quiet, all of it


async def test_a_call_that_gives_nothing_back_is_not_repeated_at_once():
    process = Process()
    process.used += 2 * SPARE_BYTES  # live, whatever for
    assert await process.trimmer.check(0.0)
    assert not await process.trimmer.check(USELESS_S / 2)
    assert await process.trimmer.check(USELESS_S)
