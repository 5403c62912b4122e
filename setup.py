"All settings live in `settings.ini`: edit there, not here."

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def words(key):
    return shlex.split(cfg.get(key, ''))


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license=cfg['license'],
    python_requires='>=' + cfg['min_python'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['assets/**/*']},
    install_requires=words('requirements'),
    extras_require={
        'export': words('export_requirements'),
        'eval': words('eval_requirements'),
        'phone': words('phone_requirements'),  # not in dev: it pins older packages
        'dev': words('dev_requirements')
        + words('export_requirements')
        + words('eval_requirements'),
    },
    entry_points={
        'console_scripts': words('console_scripts'),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
