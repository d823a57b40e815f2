"""When the loop learns that it is to stop: of several hosts, without waiting for the step under way."""

import threading

from engine.parallel import Devices
from engine.train.loop import Stopped


class Hosts(Devices):
    """Devices as of several hosts; they note which answer was read after how many questions."""

    alone = False

    def __init__(self):
        super().__init__("jit")
        self.asked, self.read = 0, []

    def ask(self, flag):
        self.asked += 1
        return Answer(self, self.asked, flag)


class Answer:
    def __init__(self, hosts, number, flag):
        self._hosts, self._number, self._flag = hosts, number, flag

    def __bool__(self):
        self._hosts.read.append((self._number, self._hosts.asked))
        return self._flag


def test_several_hosts_read_an_answer_when_the_next_step_is_under_way():
    hosts, stop = Hosts(), threading.Event()
    stopped = Stopped(hosts, stop)
    assert [stopped(last=False) for _ in range(3)] == [False, False, False]
    stop.set()
    assert [stopped(last=False) for _ in range(2)] == [False, True]
    assert hosts.read == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_signal_in_the_last_step_is_not_lost():
    hosts, stop = Hosts(), threading.Event()
    stopped = Stopped(hosts, stop)
    assert not stopped(last=False)
    stop.set()
    assert stopped(last=True)
    assert hosts.read == [(2, 2)]


def test_a_host_alone_stops_at_once():
    stop = threading.Event()
    stopped = Stopped(Devices("jit"), stop)
    assert not stopped(last=False)
    stop.set()
    assert stopped(last=False)
