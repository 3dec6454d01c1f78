"""What a run reports: metrics, the ledger of its questions, tables, curves and a page."""
