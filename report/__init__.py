"""The reports of a run: metrics, the ledger of its questions, tables, curves and an HTML page."""
