"""What a run leaves for people: one self-contained HTML page, and a card beside the model."""

from stillhouse.report.card import write_model_card
from stillhouse.report.html import write_report

__all__ = ["write_model_card", "write_report"]
