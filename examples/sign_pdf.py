"""Several PDF files signed at once on a token, and validated by pyHanko itself."""

import asyncio
import io

from asn1crypto.x509 import Certificate
from pkcs11 import KeyType
from pyhanko.pdf_utils.generic import ArrayObject, NumberObject, StreamObject
from pyhanko.pdf_utils.incremental_writer import IncrementalPdfFileWriter
from pyhanko.pdf_utils.reader import PdfFileReader
from pyhanko.pdf_utils.writer import PageObject, PdfFileWriter
from pyhanko.sign.signers import PdfSignatureMetadata, PdfSigner
from pyhanko.sign.validation import async_validate_pdf_signature
from pyhanko_certvalidator import ValidationContext

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.integrations.pdf import load_signer
from pkcs11_pool.integrations.x509 import load_issuer


async def sign(
    pool: TokenPool, files: list[bytes], mine: Certificate
) -> list[io.BytesIO]:
    """All of them at once; of each only a short signature is made on the token."""
    signer = PdfSigner(
        PdfSignatureMetadata(field_name="Signature1"),
        await load_signer(pool.key(label="pdf"), mine),
    )
    writers = [IncrementalPdfFileWriter(io.BytesIO(file)) for file in files]
    return await asyncio.gather(*map(signer.async_sign_pdf, writers))


async def main(token: softhsm.ThrowawayToken) -> None:
    """Make a key pair and its certificate on the token, sign, validate."""
    async with TokenPool(token.module, token_label=token.label, pin="1234") as pool:
        await pool.generate_keypair(KeyType.RSA, 2048, label="pdf", store=True)
        issuer = await load_issuer(pool.key(label="pdf"), {"common_name": "Me"})
        mine = await issuer.self_signed(days=365, ca=False, uses={"non_repudiation"})
        signed = await sign(pool, [empty_page()] * 20, mine)
    trust, good = ValidationContext(trust_roots=[mine]), 0
    for file in signed:
        signature = PdfFileReader(file).embedded_signatures[0]
        status = await async_validate_pdf_signature(signature, trust)
        good += status.bottom_line
    print(f"{good} of {len(signed)} signed PDFs are valid")


def empty_page() -> bytes:
    """A PDF to sign."""
    writer, file = PdfFileWriter(), io.BytesIO()
    contents = writer.add_object(StreamObject(stream_data=b""))
    box = ArrayObject(map(NumberObject, (0, 0, 595, 842)))
    writer.insert_page(PageObject(contents=contents, media_box=box))
    writer.write(file)
    return file.getvalue()


if __name__ == "__main__":
    with softhsm.throwaway_token() as throwaway:  # in its place: your module and PIN
        asyncio.run(main(throwaway))
