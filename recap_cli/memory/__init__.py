"""What finetuning holds: predicted, fitted to a budget, measured, drawn and explained."""
