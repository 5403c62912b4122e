"Set-ups, figures and reports of the labs and the demo"
