"""Tables, figures and `report.html`, from `results.json` alone."""
