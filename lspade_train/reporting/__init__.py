"""What was measured, shown: tables, figures and `report.html`, from `results.json` alone."""
