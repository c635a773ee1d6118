"""Made-up people, plans and a few dozen cities: the words that the built-in world is made of."""

from __future__ import annotations

FIRST = (
    "Ada Boris Carla Dario Elena Farid Greta Hugo Irina Jonas Karim Lena Marta Nils Olga Pablo Rosa Sven Tara Ugo "
    "Vera Wanda Yusuf Zoe Amir Bella Cedric Dina Emil Flora Goran Hanna Ivan Julia Kofi Lidia Milan Nora Oscar Petra "
    "Quentin Rita Samir Tilda Umar Viola Wim Yara Zeno Anouk"
).split()
LAST = (
    "Abel Brandt Costa Duarte Engel Fischer Garcia Hansen Ito Jansen Keller Lopez Moreau Novak Olsen Petrov Quist "
    "Rossi Silva Tanaka Ueda Vargas Weber Young Zeller Bauer Conti Dubois Evans Ferrari Gomez Horvat Ivanov Jensen "
    "Kaya Lindt Meyer Nagy Orlov Pires"
).split()
CITIES = (
    "Oslo Lisbon Madrid Vienna Prague Athens Dublin Zurich Warsaw Helsinki Geneva Munich Porto Naples Seville Lyon "
    "Krakow Bergen Malmo Ghent Leipzig Toulouse Valencia Bologna Tallinn Riga Vilnius Zagreb Sofia Ankara Cairo Tunis "
    "Dakar Lagos Nairobi Osaka Kyoto Seoul Hanoi Manila Delhi Mumbai Quito Lima Bogota Havana Boston Denver Seattle "
    "Toronto"
).split()
STREETS = "Oak Maple Cedar Birch Linden Harbour Mill Church Garden Station Castle Bridge Market River Forest".split()
MATTERS = (
    "budget design hiring launch garden piano tax security sales kitchen holiday choir chess roof travel school "
    "contract server website poster"
).split()
KINDS = "review meeting lesson call workshop dinner check rehearsal interview tour".split()
PRODUCTS = (
    "lamp kettle backpack tent novel atlas puzzle drone keyboard headset jacket scarf boots blender toaster racket "
    "helmet camera speaker notebook"
).split()

PEOPLE = [f"{first} {last}" for first in FIRST for last in LAST]
TITLES = [f"{matter} {kind}" for matter in MATTERS for kind in KINDS]
DAYS = [(month, day) for month in range(1, 13) for day in range(1, 29)]
