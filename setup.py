"""Packaging from settings.ini. The version lives in vfmvae/__init__.py alone."""
import re, shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
version = re.search(r'__version__ = "([^"]+)"', (root/'vfmvae/__init__.py').read_text(encoding='utf-8'))[1]

extras = {k.removesuffix('_requirements'): shlex.split(v) for k, v in cfg.items() if k.endswith('_requirements')}
# [dev] is everything that tests and notebooks need; torch-fidelity fetches its own weights only when an Inception is made
extras['dev'] = [r for packages in extras.values() for r in packages]

setup(name=cfg['name'], version=version, description=cfg['description'], author=cfg['author'],
      license=cfg['license'], keywords=cfg['keywords'].split(), python_requires=f">={cfg['min_python']}",
      long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=[*find_packages(include=['vfmvae', 'vfmvae.*']), 'vfmvae.data'],
      package_dir={'vfmvae.data': 'data'}, package_data={'vfmvae.data': ['*', '**/*']},
      install_requires=shlex.split(cfg['requirements']), extras_require=extras,
      classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                   'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
      entry_points=dict(console_scripts=shlex.split(cfg['console_scripts']), nbdev=['vfmvae=vfmvae._modidx:d']))
