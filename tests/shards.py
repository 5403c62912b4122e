"Webdataset shards for tests, written by hand, so that nothing of the library under test helps"

import io
import tarfile


def shard(path, samples, start=0, under=''):
    "A tar of `samples`, dicts of text or bytes by extension; their keys count from `start`"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for i, s in enumerate(samples, start):
            for ext, data in s.items():
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(f'{under}{i:04}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)
