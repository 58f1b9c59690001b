"""Commands to ranks that generate."""

from __future__ import annotations

import multiprocessing
import threading

from launch.local.engine_ranks import EngineRanks
from moe_train.config.inference import EngineConfig
from moe_train.config.schema import Config
from moe_train.inference import protocol
from parallel.layout import ParallelLayout

READY = protocol.Ready(64, 16, 0, 100, "one rank")


def test_who_submits_does_not_wait_for_rank_0_to_read() -> None:
    """The event loop of a server submits: while it waits, no other request is answered."""
    own, of_rank_0 = multiprocessing.Pipe()
    ranks = EngineRanks(Config(), ParallelLayout(tp=1, pp=1, vpp=1, cp=1, ep=1, etp=1, dp=1), EngineConfig())
    ranks._take(READY, own)
    prompt = list(range(100_000))  # more than the connection holds

    def requests() -> None:
        for _ in range(3):
            ranks.cancel(ranks.submit(prompt, {"n": 1}, ["x"], lambda event: None))

    with own, of_rank_0, ranks._writing(own):
        submitting = threading.Thread(target=requests, daemon=True)
        submitting.start()
        submitting.join(30)
        assert not submitting.is_alive()
        for number in range(3):
            assert of_rank_0.recv() == protocol.Submit(number, prompt, {"n": 1}, ("x",))
            assert of_rank_0.recv() == protocol.Cancel(number)
        of_rank_0.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "commands"]
