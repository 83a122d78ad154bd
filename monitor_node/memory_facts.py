"""What is known of memory beside the device's readings: the trainer's word, orders in force, the trend.

Folded from the streams as part of run_view.py; bounded; decides nothing. Retries of the allocator count by
reports with progress between them, since a report is sent at more occasions than a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import (
    MemoryAction,
    MemoryReport,
    Order,
    OrderDone,
    Reading,
    VramSample,
)
from monitor_node import order_book
from monitor_node.order_book import OrderBook
from monitor_node.peak_forecast import PeakSeries, need_bytes, seen

_MAX_READINGS = 128  # names
THRASHING_REPORTS = 2  # in a row with more retries, as in MosaicML Composer


@dataclass(kw_only=True)
class MemoryFacts:
    report: MemoryReport | None = None
    book: OrderBook = field(default_factory=OrderBook)
    peaks: PeakSeries = field(default_factory=PeakSeries)
    readings: dict[str, Reading] = field(default_factory=dict)  # newest of each name
    _counted: MemoryReport | None = None
    _retrying_reports: int = 0  # in a row

    @property
    def is_thrashing(self) -> bool:
        """The allocator frees its cache to find room, step after step: as slow as it is close to the end."""
        return self._retrying_reports >= THRASHING_REPORTS

    def fold_sample(self, sample: VramSample, at_seconds: float) -> None:
        for reading in sample.readings:
            if reading.name in self.readings or len(self.readings) < _MAX_READINGS:
                self.readings[reading.name] = reading
        if sample.used_bytes is not None:
            self.peaks = seen(self.peaks, need_bytes(sample.used_bytes, self.report), at_seconds=at_seconds)

    def fold_report(self, report: MemoryReport) -> None:
        self.report = report
        self.book = order_book.reported(self.book, report)
        counted = self._counted
        if (
            counted is not None
            and report.step == counted.step
            and report.alloc_retries >= counted.alloc_retries
        ):
            return
        is_later = counted is not None and report.step > counted.step
        is_retrying = is_later and counted is not None and report.alloc_retries > counted.alloc_retries
        self._retrying_reports = self._retrying_reports + 1 if is_retrying else 0
        self._counted = report

    def fold_order(self, order: Order, at_seconds: float) -> None:
        self.book = order_book.ordered(self.book, order, at_seconds=at_seconds)

    def fold_done(self, done: OrderDone) -> None:
        waiting = {order.order_id: order for order in self.book.waiting}
        self.book = order_book.answered(self.book, done)
        order = waiting.get(done.order_id)
        if order is not None and done.done:
            self._retrying_reports = 0  # what was before the order says nothing of what is after it
            if order.action is not MemoryAction.CLEANUP:
                self.peaks = PeakSeries()

    def trainer_started(self) -> None:
        self.book = order_book.trainer_started(self.book)
        self._counted, self._retrying_reports = None, 0
