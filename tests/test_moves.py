"""How far one batch and one step travel: a reader should be able to follow them."""

from benchmarks import moves


def test_a_steady_batch_moves_little_between_few_rooms() -> None:
    found = moves.moves_of_batch(5)
    assert {room for _, room in found.entered} == {"memsyn", "measuring", "engine", "kernels"}
    assert found.rooms.total() <= 60


def test_moves_are_counted_as_calls_and_returns_between_places() -> None:
    found = moves.Moves()
    for event, file in (("call", "a/x.py"), ("call", "a/y.py"), ("call", "b/z.py"), ("return", ""), ("return", "")):
        found.note(event, (file, file[0]) if event == "call" else None)
    assert found.files.total() == 4  # x -> y -> z -> y -> x
    assert found.rooms.total() == 2  # a -> b -> a
